"""Where the rows of the rounds go beside the log: a CSV file, TensorBoard.

They say what the log says. A run that begins or goes on writes them anew from the log, which a
resume has put back to its checkpoint, so no round is there twice and none is missing, whenever they
were switched on.
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
from . import nolinks
from .files import write_atomic
from .reader import RunFiles

Numbers = Mapping[str, float | int]
Columns = Mapping[str, np.ndarray]


class Sink(Protocol):
    """What takes the rows of a run; ``Log`` is one."""

    def append(self, round_: int, rounds: Numbers, clients: Columns, ranks: Columns) -> None:
        """Add a round: its numbers, those of the clients [N] and the seconds of the ranks [R], as
        ``Log.append``.
        """

    def close(self) -> None:
        """It takes no more rows."""


def open_sinks(run: Path, *, csv: bool, tensorboard: bool) -> list[Sink]:
    """The sinks of a run folder, with the rounds that its log has. Raises ValueError without
    tensorboardX.
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
    """``rounds.csv``: a row a round with the columns of ``/rounds``, empty where a number is
    unknown; on disk when ``append`` returns. Whoever reads it meanwhile sees whole rows.
    """

    def __init__(self, path: Path, rounds: Columns, clients: Columns) -> None:
        """Put the rounds so far in the place of what ``path`` had."""
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
            # at once
            self._file.write(
                (header + _csv_line(row[name] for name in self._column_names)).encode()
            )
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """``tensorboard/``: every column of ``/rounds`` as a scalar, the clients' accuracies as a
    histogram, by round.
    """

    def __init__(self, folder: Path, rounds: Columns, clients: Columns) -> None:
        """Begin a file with the rounds so far. TensorBoard forgets those of earlier files, which
        stay: one that is looking on would not go on to the new file if its own were gone.
        """
        with explain_write_errors(folder), nolinks.open_folder(folder, folder.parent, create=True):
            # their names count seconds; the new one must come last, and be new
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
    """The library that writes TensorBoard's files. Raises ValueError where it is missing."""
    try:
        import tensorboardX
    except ImportError as error:
        raise ValueError(
            "tensorboard = true: needs tensorboardX; pip install 'fedlora-mpi[tensorboard]'"
        ) from error
    return tensorboardX


def _csv_line(cells) -> str:
    """A row of the file; what is no number is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        "" if value != value else csv_cell(value) for value in cells
    )
    return text.getvalue()
