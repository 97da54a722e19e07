"""``RUN/log.h5``: one row a round, written by one process, whole after a kill at any moment between rows.

``/rounds/<name>`` [T], ``/clients/<name>`` [T, N] float32, ``/partition``; the resolved config (YAML and
JSON) and the number of clients as attributes of the file, the versions of the parts as attributes of
``/versions``.
"""

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import h5py
import numpy as np

from . import hdf5
from .files import StoreError

UNITS = {"seconds_*": "seconds", "bytes_*": "bytes", "*accuracy*": "fraction", "*flops*": "FLOP"}
PARTITION_AXES = {"indices": ["sample"], "offsets": ["boundary"], "counts": ["client", "class"]}


class Log:
    """An open log. Rows that ``append`` has returned from survive kill -9 (libver default, no SWMR)."""

    def __init__(self, file: h5py.File):
        """Take over ``file``, cutting a row that a kill has left in some columns only."""
        self._file = file
        self._columns = {
            f"{group}/{name}": ds for group in ("rounds", "clients") for name, ds in file[group].items()
        }
        rows = min((len(column) for column in self._columns.values()), default=0)
        for column in self._columns.values():
            column.resize(rows, axis=0)

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        config_yaml: str,
        config_json: str,
        versions: Mapping[str, str],
        clients: int,
        partition: Mapping[str, np.ndarray | str],
    ) -> "Log":
        """A new log without rows; ``partition`` as ``/partition`` holds it (see ``ragged``).

        Raises StoreError when there is one already.
        """
        if Path(path).exists():
            raise StoreError(f"{path}: there is a log already; resume its run, or choose another output")
        with hdf5.create(Path(path)) as file:
            file.attrs.update(config_yaml=config_yaml, config_json=config_json, clients=clients)
            file.create_group("versions").attrs.update(versions)
            for group in ("rounds", "clients"):
                file.create_group(group, track_order=True)
            group = file.create_group("partition")
            for name, value in partition.items():
                if isinstance(value, str):
                    group.attrs[name] = value
                else:
                    hdf5.write(group, name, value, PARTITION_AXES.get(name.rpartition("_")[2], ()))
        return cls.append_to(path)

    @classmethod
    def append_to(cls, path: Path) -> "Log":
        """The log of an earlier process, to go on with. Raises StoreError."""
        return cls(hdf5.open_file(Path(path), "r+"))

    def append(
        self, round_: int, rounds: Mapping[str, float | int], clients: Mapping[str, np.ndarray | float]
    ) -> None:
        """Add the row of one round, on disk on return; ``nan`` is the row of clients who were not evaluated.

        ``clients`` are [N] each. The first row decides the columns and which of them are integers.
        """
        row = {"rounds/round": round_}
        row |= {f"rounds/{name}": value for name, value in rounds.items()}
        row |= {f"clients/{name}": value for name, value in clients.items()}
        if not self._columns:
            self._columns.update({name: self._column(name, value) for name, value in row.items()})
        assert row.keys() == self._columns.keys(), (
            f"not in every row: {sorted(row.keys() ^ self._columns.keys())}"
        )
        for name, value in row.items():
            given, column = np.asarray(value), self._columns[name]
            assert np.can_cast(given.dtype, column.dtype, "same_kind"), (
                f"{name}: {given.dtype} into {column.dtype}"
            )
            assert given.shape in ((), column.shape[1:]), f"{name}: {given.shape} into {column.shape}"
        last = self._columns["rounds/round"]
        rows = len(last)
        assert rows == 0 or round_ > last[-1], f"round {round_} after round {last[-1]}"
        for name, value in row.items():
            self._columns[name].resize(rows + 1, axis=0)
            self._columns[name][rows] = value
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def describe(self, config_yaml: str, config_json: str) -> None:
        """Record the config that goes on from here: a resume may change some of its keys."""
        self._file.attrs.update(config_yaml=config_yaml, config_json=config_json)

    def lost(self, text: str) -> None:
        """Keep a line about ranks that have died in the attribute ``lost``, an array of lines."""
        self._file.attrs["lost"] = [*self._file.attrs.get("lost", ()), text]
        self._file.flush()

    def close(self) -> None:
        """Close the file; the log takes no more rows."""
        self._file.close()

    def _column(self, path: str, value: float | int | np.ndarray) -> h5py.Dataset:
        """A new column without rows, ``/rounds/<name>`` [0] or ``/clients/<name>`` [0, N]."""
        group, name = path.split("/")
        if group == "rounds":
            row, dtype, chunk = (), np.asarray(value).dtype, (256,)
        else:
            clients = int(self._file.attrs["clients"])
            row, dtype, chunk = (clients,), np.float32, (16, min(clients, 4096))
        column = self._file[group].create_dataset(
            name, (0, *row), dtype, maxshape=(None, *row), chunks=chunk, fletcher32=True
        )
        column.attrs["unit"] = next(
            (unit for pattern, unit in UNITS.items() if fnmatchcase(name, pattern)), ""
        )
        return hdf5.label(column, ("round", "client"))


def ragged(name: str, lists: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Lists of different lengths as two arrays: ``<name>_indices``, flat, and ``<name>_offsets`` [N + 1].

    List ``n`` is ``indices[offsets[n]:offsets[n + 1]]``.
    """
    offsets = np.cumsum([0, *map(len, lists)])
    return {f"{name}_indices": np.concatenate(lists).astype(np.int64), f"{name}_offsets": offsets}
