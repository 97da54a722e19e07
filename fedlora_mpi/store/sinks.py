"""Optional copies of the log's rows: a CSV file and TensorBoard.

A sink has the same content as the log. When a run begins or continues, the sink is written anew
from the log, which a resume has restored to its checkpoint. So no round is missing or occurs twice,
whenever the sink was switched on.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ..core.disk_errors import explain_write_errors
from ..core.escapes import csv_cell
from ..core.extras import extra_imports
from . import nolinks
from .files import write_atomic
from .reader import RunFiles

Numbers = Mapping[str, float | int]
Columns = Mapping[str, np.ndarray]


class Sink(Protocol):
    """A receiver of the rows of a run; ``Log`` is one."""

    def append(self, round_: int, rounds: Numbers, clients: Columns, ranks: Columns) -> None:
        """Add a round: its numbers, those of the clients [N] and the seconds of the ranks [R].

        See ``Log.append``.
        """

    def close(self) -> None:
        """Close the sink: it takes no more rows."""


def open_sinks(run: Path, *, csv: bool, tensorboard: bool) -> list[Sink]:
    """Return the sinks of a run folder, filled with the rounds of its log.

    Raises ValueError without tensorboardX.
    """
    sink_types: list[tuple[Callable[[Path, Columns, Columns], Sink], Path, bool]] = [
        (CsvSink, run / "rounds.csv", csv),
        (TensorBoardSink, run / "tensorboard", tensorboard),
    ]
    if not (csv or tensorboard):
        return []
    files = RunFiles(run)
    return [
        sink_type(path, files.rounds(), files.clients())
        for sink_type, path, is_enabled in sink_types
        if is_enabled
    ]


class CsvSink:
    """``rounds.csv``: one row per round with the columns of ``/rounds``; unknown numbers are empty.

    A row is on disk when ``append`` returns. A concurrent reader sees complete rows.
    """

    def __init__(self, path: Path, rounds: Columns, clients: Columns) -> None:
        """Replace the content of ``path`` by the rounds so far."""
        names = list(rounds) if len(rounds["round"]) else []
        rows = [
            _csv_line(column[index] for column in rounds.values())
            for index in range(len(rounds["round"]))
        ]
        write_atomic(path, "".join([_csv_line(names), *rows] if names else []).encode())
        handle = nolinks.open_handle(path, os.O_WRONLY | os.O_APPEND)
        self._path, self._column_names = path, names
        self._file = open(handle, "ab", buffering=0)  # noqa: SIM115

    def append(self, round_: int, rounds: Numbers, clients: Columns, ranks: Columns) -> None:
        row = {"round": round_, **rounds}
        header = "" if self._column_names else _csv_line(row)
        self._column_names = self._column_names or list(row)
        with explain_write_errors(self._path):
            # header and row in one write
            self._file.write(
                (header + _csv_line(row[name] for name in self._column_names)).encode()
            )
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """``tensorboard/``: columns of ``/rounds`` as scalars, accuracies of clients as histograms."""

    def __init__(self, folder: Path, rounds: Columns, clients: Columns) -> None:
        """Begin a new file with the rounds so far.

        TensorBoard then ignores the rounds in earlier files. These files stay: a running
        TensorBoard would not move on to the new file if its current file were removed.
        """
        with explain_write_errors(folder), nolinks.open_folder(folder, folder.parent, create=True):
            # names contain whole seconds, so a suffix makes the new name unique and last
            earlier_files = [*folder.glob("events*")]
        earlier_numbers = [
            int(file.suffix[1:]) for file in earlier_files if file.suffix[1:].isdecimal()
        ]
        suffix = f".{max(earlier_numbers, default=0) + 1}"
        self._writer = import_tensorboard().SummaryWriter(
            str(folder), purge_step=0, filename_suffix=suffix
        )
        seconds = sum(
            (column for name, column in rounds.items() if name.startswith("seconds_")),
            np.zeros(len(rounds["round"])),
        )
        seconds_ago = np.cumsum(seconds[::-1])[::-1] - seconds
        for index, round_ in enumerate(rounds["round"]):
            row = {name: column[index] for name, column in rounds.items() if name != "round"}
            self._write(
                int(round_),
                row,
                {name: column[index] for name, column in clients.items()},
                time.time() - seconds_ago[index],
            )
        self._writer.flush()

    def append(self, round_: int, rounds: Numbers, clients: Columns, ranks: Columns) -> None:
        self._write(round_, rounds, clients, time.time())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, round_: int, rounds: Numbers, clients: Columns, walltime: float) -> None:
        for name, value in rounds.items():
            if not np.isnan(value):
                self._writer.add_scalar(name, value, round_, walltime=walltime)
        for name, column in clients.items():
            if "accuracy" in name and len(finite := column[~np.isnan(column)]):
                self._writer.add_histogram(f"clients/{name}", finite, round_, walltime=walltime)


def import_tensorboard():
    """Return the module ``tensorboardX``. Raises ValueError when it is missing."""
    with extra_imports("tensorboardX", "tensorboard", "tensorboard = true"):
        import tensorboardX
    return tensorboardX


def _csv_line(cells) -> str:
    """Return a row of the file. NaN becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        "" if value != value else csv_cell(value) for value in cells
    )
    return text.getvalue()
