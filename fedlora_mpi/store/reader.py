"""A run folder for those who analyse it: without torch, and while the run is still going."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from ..core.escapes import escape_line
from . import checkpoint, hdf5, schema, seal, snapshot
from .files import FormatError, StoreError, checksum, opened_file
from .log import GROUPS
from .snapshot import Checkpoint

T = TypeVar("T")
_LARGEST = 1 << 28  # bytes of a text, a vocabulary for instance
# seconds; the writer's flush, in which a read can fail, takes milliseconds
WAITS = (0.02, 0.02, 0.1, 0.5, 0)
Columns = dict[str, dict[str, np.ndarray]]  # by group and name


class RunFiles:
    """The log and the checkpoints of one run: ``config`` (parsed), ``config_yaml`` and ``versions``
    too.

    Every call reads anew. Raises StoreError when ``path`` is not a run folder.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not (self.path / "log.h5").is_file():
            raise StoreError(
                f"{path}: not a run folder, it has no log.h5; give the `output` of a run"
            )
        log = self.path / "log.h5"
        attrs, self.versions = self._read(
            lambda log, _: (
                schema.attributes(log),
                schema.attributes(schema.group_of(log, "versions")),
            )
        )
        with schema.reading(log):
            self.config_yaml: str = schema.member(attrs, "config_yaml", str)
            # a line for each time that ranks died
            self.lost: list[str] = schema.member({"lost": [], **attrs}, "lost", list)
            self.config: dict[str, Any] = schema.json_block(
                schema.member(attrs, "config_json", str), "config_json"
            )
            self._beside = schema.json_block(
                schema.member({"beside": "{}", **attrs}, "beside", str), "beside"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """``config``, which says whatever an analysis asks of every run. Raises StoreError."""
        with schema.reading(self.path / "log.h5"):
            schema.check_settings(self.config)
        return self.config

    def text(self, name: str) -> str:
        """A file of the folder that the run wrote beside its log. Raises StoreError: missing or
        damaged.
        """
        path = self.path / name
        try:
            with opened_file(path, self.path) as file:
                content = file.read(_LARGEST + 1)
            text = content.decode()
            if len(content) > _LARGEST:
                raise StoreError(f"larger than {_LARGEST} bytes")
        except (OSError, UnicodeDecodeError, StoreError) as why:
            raise StoreError(
                f"{path}: missing or damaged ({why}); remove it, a resume writes it anew"
            ) from why
        if self._beside.get(name, found := checksum(text)) != found:
            raise StoreError(
                f"{path}: checksum differs, the file is damaged; remove it, a resume writes it anew"
            )
        return text

    def rows(self) -> Columns:
        """``rounds()``, ``clients()`` and ``ranks()`` by these names, of equally many rounds."""
        found = self._read(lambda _, columns: columns)
        return found | {"rounds": {"round": np.arange(0)} | found["rounds"]}

    def rounds(self) -> dict[str, np.ndarray]:
        """Columns [T] by name, ``round`` first."""
        return self.rows()["rounds"]

    def clients(self) -> dict[str, np.ndarray]:
        """Columns [T, N] by name, a row of NaN where the round was not evaluated."""
        return self.rows()["clients"]

    def ranks(self) -> dict[str, np.ndarray]:
        """``ranks`` [T], how many there were, and ``seconds_<stage>`` [T, R] by name, NaN beyond
        them; {} in a log of before there were any. Rounds without ranks measured none: theirs are
        in the next that did.
        """
        return self.rows()["ranks"]

    def measured(self, *names: str) -> Columns:
        """``rows()``, in which every run has these columns of the rounds, where it has any round.
        Raises StoreError.
        """
        found = self.rows()
        if len(found["rounds"]["round"]) and (
            missing := [name for name in names if name not in found["rounds"]]
        ):
            raise StoreError(f"{self.path / 'log.h5'}: has no column rounds/{missing[0]}")
        if "accuracy" in found["rounds"] and "accuracy" not in found["clients"]:
            raise StoreError(f"{self.path / 'log.h5'}: has no column clients/accuracy")
        return found

    def axes(self, path: str) -> tuple[str, ...]:
        """The names of a column's axes, as the file has them. Raises StoreError."""
        found = self._read(
            lambda log, _: [axis.label for axis in log[path].dims] if path in log else None
        )
        if found is None:
            raise StoreError(f"{self.path}: there is no column {path!r}")
        return tuple(found)

    def partition(self) -> dict[str, Any]:
        """``train`` and ``test`` (lists of index arrays), ``train_counts`` [N, classes], ...,
        ``digest``.
        """
        found = self._read(lambda log, _: _everything(schema.group_of(log, "partition")))
        for name in [name.removesuffix("_offsets") for name in found if name.endswith("_offsets")]:
            offsets = found.pop(f"{name}_offsets")
            found[name] = np.split(found.pop(f"{name}_indices"), offsets[1:-1])
        return found

    def checkpoints(self) -> list[int]:
        """The rounds with a committed checkpoint, ascending."""
        return checkpoint.committed(self.path)

    def checkpoint(self, round_: int | None = None) -> Checkpoint:
        """The verified checkpoint of a round, by default the newest valid one, with a warning for
        each newer one.

        Raises StoreError.
        """
        if round_ is None:
            found, skipped = checkpoint.newest(self.path)
            for line in skipped:
                warnings.warn(escape_line(f"skipped {line}"), stacklevel=2)
            return found
        if round_ not in (there := self.checkpoints()):
            raise StoreError(f"{self.path}: no checkpoint of round {round_}; there are {there}")
        found = Checkpoint.read(snapshot.folder_of(self.path, round_))
        found.verify()
        return found

    def digest(self) -> dict[str, str]:
        """{"shared", "personal"}: SHA-256 of the newest checkpoint's leaves (see
        ``Checkpoint.digest``).
        """
        return self.checkpoint().digest()

    def _read(self, part: Callable[[h5py.File, Columns], T]) -> T:
        """``part`` of the log and its columns, tried again when it met the writer's flush."""
        path = self.path / "log.h5"
        for wait in WAITS:
            try:
                with hdf5.open_file(path) as log:
                    columns = _columns(log)
                    seal.verify(
                        log,
                        {f"{group}/{n}": v for group in columns for n, v in columns[group].items()},
                    )
                    return part(log, columns)
            except FormatError:
                raise
            except Exception as why:
                # h5py raises nearly anything on a file that moves or is damaged
                last = why
                time.sleep(wait)
        copies, said = self.path / "checkpoints" / "*" / "log.h5", schema.summarize_error(last)
        raise StoreError(f"{path}: unreadable ({said}); resume repairs it, from {copies}") from last


def _columns(log: h5py.File) -> Columns:
    """The rows that all columns have: [T] under "rounds", [T, N] under "clients", [T, R] under
    "ranks".
    """
    found = {
        group: dict(schema.group_of(log, group).items()) if group in log else {} for group in GROUPS
    }
    schema.check_columns(found, schema.attribute(log, "clients"))
    every = [column for columns in found.values() for column in columns.values()]
    rows = min(map(len, [*every, *([log[seal.ROWS]] if seal.ROWS in log else [])]), default=0)
    return {
        group: {name: hdf5.read(column, rows) for name, column in columns.items()}
        for group, columns in found.items()
    }


def _everything(group: h5py.Group) -> dict[str, Any]:
    """The attributes and the data sets of ``group``."""
    found = {name: hdf5.read(schema.table(group, name, 0)) for name in group}
    schema.check_partition(found)
    return schema.attributes(group) | found
