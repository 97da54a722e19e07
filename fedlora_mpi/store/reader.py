"""Read a run folder for analysis: without torch, and also while the run continues."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from ..core.escapes import escape_line
from . import checkpoint, hdf5, schema, seal, snapshot
from .files import FormatError, StoreError, open_for_reading, text_checksum
from .log import GROUPS
from .snapshot import Checkpoint
from .sweep_folder import refuse_sweep

T = TypeVar("T")
_MAX_TEXT_BYTES = 1 << 28  # of a text file, for example a vocabulary
# seconds; a read can fail during the writer's flush, which takes milliseconds
RETRY_DELAYS = (0.02, 0.02, 0.1, 0.5, 0)
Columns = dict[str, dict[str, np.ndarray]]  # by group and name


class RunFiles:
    """The log and the checkpoints of one run.

    ``config`` is the parsed config, ``config_yaml`` its text, ``versions`` those of the software.
    Every method reads the files anew. The constructor raises StoreError when ``path`` is not a run
    folder.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not (self.path / "log.h5").is_file():
            refuse_sweep(self.path)
            raise StoreError(
                f"{path}: not a run folder, it has no log.h5; give the `output` of a run"
            )
        log = self.path / "log.h5"
        attrs, self.versions = self._read_with_retries(
            lambda log, _: (
                schema.read_attributes(log),
                schema.read_attributes(schema.find_group(log, "versions")),
            )
        )
        with schema.explain_read_errors(log):
            self.config_yaml: str = schema.checked_item(attrs, "config_yaml", str)
            # one line for each failure of ranks
            self.rank_failures: list[str] = schema.checked_item({"lost": [], **attrs}, "lost", list)
            # what is doubtful about the settings, a line each
            self.hints: list[str] = schema.checked_item({"hints": [], **attrs}, "hints", list)
            self.config: dict[str, Any] = schema.parse_json_block(
                schema.checked_item(attrs, "config_json", str), "config_json"
            )
            # of the topology's mixing matrix, if there is one
            self.spectral_gap: float | None = attrs.get("spectral_gap")
            if not isinstance(self.spectral_gap, float | None):
                raise StoreError(f"spectral_gap = {self.spectral_gap!r:.80}: must be a number")
            self._file_checksums = schema.parse_json_block(
                schema.checked_item({"beside": "{}", **attrs}, "beside", str), "beside"
            )

    @property
    def checked_config(self) -> dict[str, Any]:
        """``config``, after a check that it has the keys an analysis needs. Raises StoreError."""
        with schema.explain_read_errors(self.path / "log.h5"):
            schema.check_settings(self.config)
        return self.config

    def read_text(self, name: str) -> str:
        """Return the text of a file that the run wrote beside its log.

        Raises StoreError when it is missing or damaged.
        """
        path = self.path / name
        try:
            with open_for_reading(path, self.path) as file:
                content = file.read(_MAX_TEXT_BYTES + 1)
            text = content.decode()
            if len(content) > _MAX_TEXT_BYTES:
                raise StoreError(f"larger than {_MAX_TEXT_BYTES} bytes")
        except (OSError, UnicodeDecodeError, StoreError) as why:
            raise StoreError(
                f"{path}: missing or damaged ({why}); remove it, a resume writes it anew"
            ) from why
        if self._file_checksums.get(name, actual := text_checksum(text)) != actual:
            raise StoreError(
                f"{path}: checksum differs, the file is damaged; remove it, a resume writes it anew"
            )
        return text

    def columns(self) -> Columns:
        """Return ``rounds()``, ``clients()`` and ``ranks()`` by these names.

        All have equally many rows.
        """
        by_group = self._read_with_retries(lambda _, columns: columns)
        return by_group | {"rounds": {"round": np.arange(0)} | by_group["rounds"]}

    def rounds(self) -> dict[str, np.ndarray]:
        """Return the columns [T] of the rounds by name, ``round`` first."""
        return self.columns()["rounds"]

    def clients(self) -> dict[str, np.ndarray]:
        """Return the columns [T, N] of the clients by name, NaN in rounds without evaluation."""
        return self.columns()["clients"]

    def ranks(self) -> dict[str, np.ndarray]:
        """Return the columns of the ranks by name.

        They are ``ranks`` [T], the number of ranks, and ``seconds_<stage>`` [T, R], NaN for absent
        ranks. A round with 0 ranks was not measured; its seconds are included in the next measured
        round. Returns {} for a log of an older version that has no such columns.
        """
        return self.columns()["ranks"]

    def require_columns(self, *names: str) -> Columns:
        """Return ``columns()`` after a check that the rounds have the columns ``names``.

        A run without any round passes. Raises StoreError.
        """
        by_group = self.columns()
        if len(by_group["rounds"]["round"]) and (
            missing := [name for name in names if name not in by_group["rounds"]]
        ):
            raise StoreError(f"{self.path / 'log.h5'}: has no column rounds/{missing[0]}")
        if "accuracy" in by_group["rounds"] and "accuracy" not in by_group["clients"]:
            raise StoreError(f"{self.path / 'log.h5'}: has no column clients/accuracy")
        return by_group

    def axis_names(self, path: str) -> tuple[str, ...]:
        """Return the names of a column's axes, as stored in the file. Raises StoreError."""
        labels = self._read_with_retries(
            lambda log, _: [axis.label for axis in log[path].dims] if path in log else None
        )
        if labels is None:
            raise StoreError(f"{self.path}: there is no column {path!r}")
        return tuple(labels)

    def partition(self) -> dict[str, Any]:
        """Return the partition by name.

        It has ``train`` and ``test`` (lists of index arrays), ``train_counts`` [N, classes], ...,
        ``digest``.
        """
        arrays = self._read_with_retries(
            lambda log, _: _read_group(schema.find_group(log, "partition"))
        )
        for name in [name.removesuffix("_offsets") for name in arrays if name.endswith("_offsets")]:
            offsets = arrays.pop(f"{name}_offsets")
            arrays[name] = np.split(arrays.pop(f"{name}_indices"), offsets[1:-1])
        return arrays

    def checkpoints(self) -> list[int]:
        """Return the rounds with a committed checkpoint, in ascending order."""
        return checkpoint.committed_rounds(self.path)

    def checkpoint(self, round_: int | None = None) -> Checkpoint:
        """Return the verified checkpoint of a round, by default the newest valid one.

        By default it warns of each newer checkpoint that is invalid. Raises StoreError.
        """
        if round_ is None:
            verified, skipped = checkpoint.newest_valid(self.path)
            for line in skipped:
                warnings.warn(escape_line(f"skipped {line}"), stacklevel=2)
            return verified
        if round_ not in (available := self.checkpoints()):
            raise StoreError(f"{self.path}: no checkpoint of round {round_}; there are {available}")
        verified = Checkpoint.read(snapshot.checkpoint_folder(self.path, round_))
        verified.verify()
        return verified

    def digest(self) -> dict[str, str]:
        """Return {"shared", "personal"}: SHA-256 of the leaves of the newest valid checkpoint.

        See ``Checkpoint.digest``.
        """
        return self.checkpoint().digest()

    def _read_with_retries(self, extract: Callable[[h5py.File, Columns], T]) -> T:
        """Return ``extract(log, columns)``.

        A read that fails during the writer's flush is repeated.
        """
        path = self.path / "log.h5"
        for wait in RETRY_DELAYS:
            try:
                with hdf5.open_file(path) as log:
                    columns = _read_columns(log)
                    seal.verify(
                        log,
                        {f"{group}/{n}": v for group in columns for n, v in columns[group].items()},
                    )
                    return extract(log, columns)
            except FormatError:
                raise
            except Exception as why:
                # h5py raises many types of errors on a file that changes or is damaged
                last_error = why
                time.sleep(wait)
        log_copies, reason = (
            self.path / "checkpoints" / "*" / "log.h5",
            schema.summarize_error(last_error),
        )
        raise StoreError(
            f"{path}: unreadable ({reason}); resume repairs it, from {log_copies}"
        ) from last_error


def _read_columns(log: h5py.File) -> Columns:
    """Return the rows that all columns have.

    Their shapes are [T] in "rounds", [T, N] in "clients", and [T] or [T, R] in "ranks".
    """
    datasets = {
        group: dict(schema.find_group(log, group).items()) if group in log else {}
        for group in GROUPS
    }
    schema.check_columns(datasets, schema.read_attribute(log, "clients"))
    all_datasets = [column for columns in datasets.values() for column in columns.values()]
    rows = min(
        map(len, [*all_datasets, *([log[seal.ROW_SEALS]] if seal.ROW_SEALS in log else [])]),
        default=0,
    )
    return {
        group: {name: hdf5.read(column, rows) for name, column in columns.items()}
        for group, columns in datasets.items()
    }


def _read_group(group: h5py.Group) -> dict[str, Any]:
    """Return the attributes and the data sets of ``group``."""
    arrays = {name: hdf5.read(schema.find_dataset(group, name, 0)) for name in group}
    schema.check_partition(arrays)
    return schema.read_attributes(group) | arrays
