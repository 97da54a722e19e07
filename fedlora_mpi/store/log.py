"""``RUN/log.h5``: one row a round, written by one process, whole after a kill at any moment between
rows.

``/rounds/<name>`` [T], ``/clients/<name>`` [T, N] float32, ``/ranks/seconds_<stage>`` [T, R]
float32 with R the most ranks of any round and ``/ranks/ranks`` [T] how many they were (NaN beyond
them; 0 ranks where the round measured none), ``/partition``; the resolved config (YAML and JSON)
and the number of clients as attributes of the file, the versions of the parts as attributes of
``/versions``. ``seal.py`` has what tells whether all that is as it was written.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from fnmatch import fnmatchcase
from os import O_RDWR
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import DTypeLike

from ..core.disk_errors import WriteError, explain_write_errors
from . import hdf5, nolinks, schema, seal
from .disk import FallbackFile
from .files import StoreError, text_checksum

UNITS = {
    "seconds_*": "seconds",
    "bytes_*": "bytes",
    "*accuracy*": "fraction",
    "nan_*": "fraction",
    "*flops*": "FLOP",
}
# columns that a log of before there were any goes on without
_OPTIONAL_COLUMNS = {"rounds/nan_predictions"}
GROUPS = ("rounds", "clients", "ranks")
PARTITION_AXES = {"indices": ["sample"], "offsets": ["boundary"], "counts": ["client", "class"]}


class Log:
    """An open log. Rows that ``append`` has returned from survive kill -9 (libver default, no
    SWMR).
    """

    def __init__(self, path: Path):
        """Open the log of an earlier process, cutting a row that a kill has left in some columns
        only.

        Raises StoreError, WriteError.
        """
        with explain_write_errors(path):
            self._disk = FallbackFile(nolinks.open_handle(path, O_RDWR))
        self._path, self._file = path, hdf5.open_file(path, self._disk)
        file = self._file
        with schema.explain_read_errors(path):
            columns = {group: dict(file.require_group(group).items()) for group in GROUPS}
            schema.check_columns(
                columns,
                schema.checked_item(
                    {"clients": schema.read_attribute(file, "clients")}, "clients", int, 1
                ),
            )
            self._columns = {
                f"{group}/{name}": dataset
                for group, datasets in columns.items()
                for name, dataset in datasets.items()
            }
            # None: older than they are
            self._seals = (
                schema.find_dataset(file, seal.ROW_SEALS, 1) if seal.ROW_SEALS in file else None
            )
            all_columns = [*self._columns.values(), *([] if self._seals is None else [self._seals])]
            rows = min(map(len, all_columns), default=0)
            for column in all_columns:
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
        file_texts: Mapping[str, str] | None = None,
        inventory: str = "",
    ) -> "Log":
        """A new log without rows; ``partition`` as ``/partition`` holds it (see ``pack_ragged``).

        file_texts: texts of files in the folder, by name, whose checksums it keeps; inventory: JSON
        of ``read_inventory``.

        Raises StoreError when there is one already.
        """
        if Path(path).exists():
            raise StoreError(
                f"{path}: there is a log already; resume its run, or choose another output"
            )
        with hdf5.create_file(Path(path)) as file:
            file.attrs.update(config_yaml=config_yaml, config_json=config_json, clients=clients)
            file.create_group("versions").attrs.update(versions)
            for group in GROUPS:
                file.create_group(group, track_order=True)
            group = file.create_group("partition")
            for name, value in partition.items():
                if isinstance(value, str):
                    group.attrs[name] = value
                else:
                    hdf5.write(group, name, value, PARTITION_AXES.get(name.rpartition("_")[2], ()))
            if inventory:
                file.attrs["inventory"] = inventory
            file.attrs["beside"] = json.dumps(
                {name: text_checksum(text) for name, text in (file_texts or {}).items()}
            )
            seals = file.create_dataset(
                seal.ROW_SEALS, (0,), np.int64, maxshape=(None,), chunks=(256,), fletcher32=True
            )
            hdf5.label_axes(seals, ["round"])
            file.attrs[seal.HEAD_SEAL] = seal.head_checksum(file)
        return cls.reopen(path)

    @classmethod
    def reopen(cls, path: Path) -> "Log":
        """The log of an earlier process, to go on with. Raises StoreError, WriteError."""
        return cls(Path(path))

    def append(
        self,
        round_: int,
        rounds: Mapping[str, float | int],
        clients: Mapping[str, np.ndarray | float],
        ranks: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add the row of a round, on disk on return. ``clients`` without evaluation are nan.

        ``clients`` are [N] each, ``ranks`` seconds [R] of each stage. The first row decides the
        columns and which of them are integers; those of ranks begin when there are any.
        """
        row: dict[str, np.ndarray | float] = {"rounds/round": round_}
        row |= {f"rounds/{name}": value for name, value in rounds.items()}
        row |= {f"clients/{name}": value for name, value in clients.items()}
        if not self._columns:
            self._columns.update(
                {name: self._create_column(name, value) for name, value in row.items()}
            )
        row |= self._rank_row(ranks or {})
        for name in _OPTIONAL_COLUMNS - self._columns.keys():
            row.pop(name, None)
        assert row.keys() == self._columns.keys(), (
            f"not in every row: {sorted(row.keys() ^ self._columns.keys())}"
        )
        stored = {}
        for name, value in row.items():
            array, column = np.asarray(value), self._columns[name]
            assert np.can_cast(array.dtype, column.dtype, "same_kind"), (
                f"{name}: {array.dtype} into {column.dtype}"
            )
            assert array.shape in ((), column.shape[1:]), (
                f"{name}: {array.shape} into {column.shape}"
            )
            stored[name] = np.broadcast_to(array.astype(column.dtype), (1, *column.shape[1:]))
        round_column = self._columns["rounds/round"]
        rows = len(round_column)
        assert rows == 0 or round_ > round_column[-1], (
            f"round {round_} after round {round_column[-1]}"
        )
        for name, value in stored.items():
            self._columns[name].resize(rows + 1, axis=0)
            self._columns[name][rows:] = value
        if self._seals is not None:
            self._seals.resize(rows + 1, axis=0)
            self._seals[rows:] = seal.row_checksums(stored)
        self._file.flush()
        with explain_write_errors(self._path):
            self._disk.sync()

    def _rank_row(self, ranks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | int]:
        """The row of ``/ranks``. Its columns begin with the first seconds, and grow as wide as the
        most ranks ask.
        """
        rank_count = max(map(len, ranks.values()), default=0)
        if ranks and "ranks/ranks" not in self._columns:
            names = ("ranks/ranks", *(f"ranks/seconds_{stage}" for stage in ranks))
            self._columns.update({name: self._create_column(name, rank_count) for name in names})
        row = {}
        for path, column in self._columns.items():
            if path.startswith("ranks/seconds_"):
                column.resize(max(rank_count, column.shape[1]), axis=1)
                row[path] = np.full(column.shape[1], np.nan, np.float32)
                row[path][:rank_count] = ranks.get(path.removeprefix("ranks/seconds_"), np.nan)
        return row | ({"ranks/ranks": rank_count} if row else {})

    def record_config(self, config_yaml: str, config_json: str) -> None:
        """Record the config that goes on from here: a resume may change some of its keys."""
        self._file.attrs.update(config_yaml=config_yaml, config_json=config_json)
        self._update_seal()

    def record_rank_failure(self, line: str) -> None:
        """Keep a line about ranks that have died in the attribute ``lost``, an array of lines."""
        self._file.attrs["lost"] = [*schema.read_attribute(self._file, "lost", []), line]
        self._update_seal()
        self._file.flush()

    def _update_seal(self) -> None:
        """Make the checksum that of what the attributes say now."""
        if self._seals is not None:
            self._file.attrs[seal.HEAD_SEAL] = seal.head_checksum(self._file)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        with suppress(WriteError) if kind else nullcontext():  # what came first is told
            self.close()

    def close(self) -> None:
        """Close the file; the log takes no more rows. Raises WriteError."""
        if self._file:
            self._file.close()
            with explain_write_errors(self._path), closing(self._disk):
                self._disk.sync()

    def _create_column(self, path: str, value: float | int | np.ndarray) -> h5py.Dataset:
        """A new column: ``/rounds/<name>`` [0], ``/clients/<name>`` [0, N]; of ranks, which may
        begin late, with a row of nothing for each round so far: ``/ranks/ranks`` [T],
        ``/ranks/seconds_<stage>`` [T, 0].
        """
        group, name = path.split("/")
        shape: tuple[int, ...] = (0,)
        max_shape: tuple[int | None, ...] = (None,)
        chunk: tuple[int, ...] = (256,)
        dtype: DTypeLike = np.asarray(value).dtype
        if group == "clients":
            clients = int(self._file.attrs["clients"])
            shape, max_shape, chunk, dtype = (
                (0, clients),
                (None, clients),
                (16, min(clients, 4096)),
                np.float32,
            )
        elif group == "ranks":
            shape = (len(self._columns["rounds/round"]),)
            if name != "ranks":
                shape, max_shape, chunk, dtype = (*shape, 0), (None, None), (16, 64), np.float32
        fill = np.nan if np.issubdtype(dtype, np.floating) else 0
        column = self._file[group].create_dataset(
            name, shape, dtype, maxshape=max_shape, chunks=chunk, fletcher32=True, fillvalue=fill
        )
        column.attrs["unit"] = next(
            (unit for pattern, unit in UNITS.items() if fnmatchcase(name, pattern)), ""
        )
        return hdf5.label_axes(column, ("round", group.removesuffix("s")))


def read_inventory(path: Path) -> dict[str, dict[str, str]]:
    """The digests of what the run of a log began with: kind, item, digest; {} of a log without, and
    where none can be read.
    """
    try:
        with hdf5.open_file(path) as file:
            inventory = json.loads(schema.read_attribute(file, "inventory", "{}"))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        # StoreError is one; RecursionError, of deep JSON
        return {}
    groups = inventory.values() if isinstance(inventory, dict) else [None]
    if not all(
        isinstance(group, dict) and all(isinstance(v, str) for v in group.values())
        for group in groups
    ):
        return {}
    return inventory


def pack_ragged(name: str, lists: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Lists of different lengths as two arrays: ``<name>_indices`` and ``<name>_offsets`` [N + 1].

    List ``n`` is ``indices[offsets[n]:offsets[n + 1]]``.
    """
    offsets = np.cumsum([0, *map(len, lists)])
    return {f"{name}_indices": np.concatenate(lists).astype(np.int64), f"{name}_offsets": offsets}
