"""``RUN/log.h5``: one row per round, written by one process.

The log is intact after a kill at any moment between two rows. Its content:

- ``/rounds/<name>`` [T]: numbers of a round
- ``/clients/<name>`` [T, N] float32: numbers of each client
- ``/ranks/seconds_<stage>`` [T, R] float32: R is the largest number of ranks of any round; NaN for
  absent ranks
- ``/ranks/ranks`` [T]: the number of ranks, 0 if the round was not measured
- ``/partition``: the samples of each client
- ``/versions``: its attributes are the versions of the libraries
- attributes of the file: the resolved config (YAML and JSON) and the number of clients

``seal.py`` computes the checksums that detect damage.
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
# logs of older versions lack these columns and continue without them
_OPTIONAL_COLUMNS = {"rounds/nan_predictions"}
GROUPS = ("rounds", "clients", "ranks")
# axes of the data sets of /partition, by their names or else by the ends of these
PARTITION_AXES = {
    "neighbours_indices": ["neighbour"],
    "indices": ["sample"],
    "offsets": ["boundary"],
    "counts": ["client", "class"],
}


class Log:
    """An open log.

    Rows survive kill -9 once ``append`` has returned (default libver, no SWMR).
    """

    def __init__(self, path: Path):
        """Open the log of an earlier process.

        A kill may have left a row in some columns only; such a row is cut. Raises StoreError,
        WriteError.
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
            # None: the log is older than row seals
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
        spectral_gap: float | None = None,
    ) -> "Log":
        """Create a log without rows and return it.

        partition: the content of ``/partition`` (see ``pack_ragged``); file_texts: the texts of
        files in the folder, by name, whose checksums the log keeps; inventory: the JSON that
        ``read_inventory`` reads; spectral_gap: of the topology's mixing matrix, if there is one.

        Raises StoreError when a log exists already.
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
                    axes = PARTITION_AXES.get(name.rpartition("_")[2], ())
                    hdf5.write(group, name, value, PARTITION_AXES.get(name, axes))
            if spectral_gap is not None:
                file.attrs["spectral_gap"] = spectral_gap
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
        """Open the log of an earlier process to continue it. Raises StoreError, WriteError."""
        return cls(Path(path))

    def append(
        self,
        round_: int,
        rounds: Mapping[str, float | int],
        clients: Mapping[str, np.ndarray | float],
        ranks: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add the row of one round. It is on disk when the method returns.

        clients: [N] each, NaN for clients that were not evaluated; ranks: seconds [R] of each
        stage. The first row determines the columns and which of them are integers. The columns of
        ranks are created when the first measurement arrives.
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
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
                narrow = array.astype(column.dtype)
            stored[name] = np.broadcast_to(narrow, (1, *column.shape[1:]))
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
        """Return the row of ``/ranks``.

        Its columns are created with the first measurement and become wider when a round has more
        ranks.
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
        """Record the config that applies from now on: a resume may change some of its keys."""
        self._file.attrs.update(config_yaml=config_yaml, config_json=config_json)
        self._update_seal()

    def record_hints(self, lines: Sequence[str]) -> None:
        """Record doubtful settings in the attribute ``hints``, a list of lines."""
        if lines:
            self._file.attrs["hints"] = list(lines)
        elif "hints" in self._file.attrs:
            del self._file.attrs["hints"]
        self._update_seal()

    def record_rank_failure(self, line: str) -> None:
        """Append a line about failed ranks to the attribute ``lost``, a list of lines."""
        self._file.attrs["lost"] = [*schema.read_attribute(self._file, "lost", []), line]
        self._update_seal()
        self._file.flush()

    def _update_seal(self) -> None:
        """Update the checksum of the attributes."""
        if self._seals is not None:
            self._file.attrs[seal.HEAD_SEAL] = seal.head_checksum(self._file)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        with suppress(WriteError) if kind else nullcontext():  # report the first error only
            self.close()

    def close(self) -> None:
        """Close the file. Raises WriteError."""
        if self._file:
            self._file.close()
            with explain_write_errors(self._path), closing(self._disk):
                self._disk.sync()

    def _create_column(self, path: str, value: float | int | np.ndarray) -> h5py.Dataset:
        """Create a column and return it.

        Its shape is [0] for ``/rounds/<name>`` and [0, N] for ``/clients/<name>``. Columns of ranks
        may begin late, so they get an empty row for each earlier round: [T] for ``/ranks/ranks``,
        [T, 0] for ``/ranks/seconds_<stage>``.
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
    """Return the digests of the inputs of a run, as its log states them: kind -> item -> digest.

    Returns {} when the log has none or they cannot be read.
    """
    try:
        with hdf5.open_file(path) as file:
            inventory = json.loads(schema.read_attribute(file, "inventory", "{}"))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        # ValueError includes StoreError; deep JSON raises RecursionError, a RuntimeError
        return {}
    groups = inventory.values() if isinstance(inventory, dict) else [None]
    if not all(
        isinstance(group, dict) and all(isinstance(v, str) for v in group.values())
        for group in groups
    ):
        return {}
    return inventory


def pack_ragged(name: str, lists: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Pack lists of different lengths into two arrays.

    They are ``<name>_indices`` and ``<name>_offsets`` [N + 1]. List ``n`` is
    ``indices[offsets[n]:offsets[n + 1]]``.
    """
    offsets = np.cumsum([0, *map(len, lists)])
    return {f"{name}_indices": np.concatenate(lists).astype(np.int64), f"{name}_offsets": offsets}
