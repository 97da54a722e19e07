"""``manifest.json``: its presence makes a folder a checkpoint.

It lists size and checksum of every other file, and has a checksum of itself.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import files, schema
from .files import StoreError

NAME = "manifest.json"
_MAX_BYTES = 64 << 20  # a worker's entry takes about 100 bytes
_FILE_PATTERN = r"(manifest\.json|(server|log|personal|worker-\d{4,}(-\d+)?)\.h5)"


def worker_file(worker: int, client_type: int = 0) -> str:
    """Return the name of a worker's file for the clients of one type.

    Clients of one type have leaves of equal shapes.
    """
    return f"worker-{worker:04d}{f'-{client_type}' if client_type else ''}.h5"


def is_worker_file(name: str) -> bool:
    """Return whether ``worker_file`` makes such a name."""
    return name.startswith("worker-")


def is_checkpoint_file(name: str) -> bool:
    """Return whether a checkpoint has a file of this name, or a killed writer may have left one."""
    return bool(re.fullmatch(rf"{_FILE_PATTERN}|\.({_FILE_PATTERN})\.tmp", name))


def run_folder_of(folder: Path) -> Path:
    """Return the run folder that contains the checkpoint ``folder``."""
    return folder.parent.parent


@dataclass(frozen=True)
class Shard:
    """The manifest's record of one file: name in the folder, size in bytes, BLAKE2b checksum."""

    name: str
    size: int
    digest: str

    @classmethod
    def from_json(cls, block: object) -> "Shard":
        """Return the record that ``block`` of the manifest states. Raises StoreError."""
        if not isinstance(block, dict):
            raise StoreError(f"files: each must be a block, here is {type(block).__name__}")
        name, digest = (
            files.check_plain_name(schema.checked_item(block, "name", str)),
            schema.checked_item(block, "digest", str),
        )
        return cls(name, schema.checked_item(block, "size", int, 0), digest)

    @classmethod
    def from_file(cls, path: Path) -> "Shard":
        """Return the record of a file as it is now."""
        return cls(
            path.name, path.stat().st_size, files.file_digest(path, run_folder_of(path.parent))
        )

    def to_numbers(self) -> np.ndarray:
        """Return size and checksum as [3] int64, for a gather; ``from_numbers`` is the inverse."""
        return np.frombuffer(self.size.to_bytes(8, "little") + bytes.fromhex(self.digest), np.int64)

    @classmethod
    def from_numbers(cls, name: str, numbers: np.ndarray) -> "Shard":
        """Return the record of ``to_numbers``. The receiver derives the name (``worker_file``)."""
        return cls(
            name, int(numbers[0]), np.ascontiguousarray(numbers[1:], np.int64).tobytes().hex()
        )

    def verify(self, folder: Path) -> None:
        """Raise StoreError unless the file in ``folder`` matches the record. Reads all of it."""
        path = folder / self.name
        if not path.is_file():
            raise StoreError(f"{path}: missing file")
        if path.stat().st_size != self.size:
            raise StoreError(
                f"{path}: size differs ({path.stat().st_size} bytes, the manifest says {self.size})"
            )
        if files.file_digest(path, run_folder_of(folder)) != self.digest:
            raise StoreError(f"{path}: checksum differs, the file is damaged")


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's round, the digest of its config, its number of clients and its files."""

    round: int
    run_digest: str
    clients: int
    files: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Commit ``folder``: it becomes a checkpoint at the rename of ``manifest.json``."""
        fields = {"format_version": files.FORMAT_VERSION, **asdict(self)}
        text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1)
        files.write_atomic(folder / NAME, text.encode(), run_folder_of(folder))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Return the manifest of ``folder``.

        Raises StoreError when it is missing, damaged, of a newer format, or points outside the
        folder.
        """
        path = folder / NAME
        with schema.explain_read_errors(path):
            with files.open_for_reading(path, run_folder_of(folder)) as file:
                text = file.read(_MAX_BYTES + 1)
            if len(text) > _MAX_BYTES:
                raise StoreError(f"is larger than {_MAX_BYTES} bytes")
            fields = schema.parse_json_block(text, "the file")
            files.check_format(path, fields.get("format_version"))
            shards = tuple(
                Shard.from_json(shard) for shard in schema.checked_item(fields, "files", list)
            )
            names = [shard.name for shard in shards]
            if (
                duplicates := sorted({name for name in names if names.count(name) > 1})
                if len({*names}) < len(names)
                else []
            ):
                raise StoreError(f"lists {duplicates[0]} twice")
            numbers = [schema.checked_item(fields, key, int, 0) for key in ("round", "clients")]
            manifest = cls(
                numbers[0], schema.checked_item(fields, "run_digest", str), numbers[1], shards
            )
        if folder.name != f"{manifest.round:06d}":
            raise StoreError(f"{path}: of round {manifest.round}, in the folder of another")
        recorded = fields.pop("checksum", None)  # earlier versions wrote none
        if recorded is not None and recorded != _checksum(fields):
            raise StoreError(f"{path}: checksum differs, the file is damaged")
        if missing := {"server.h5", "log.h5", "personal.h5"} - {shard.name for shard in shards}:
            raise StoreError(f"{path}: does not list {min(missing)}")
        return manifest


def _checksum(fields: dict[str, Any]) -> str:
    """Return the checksum of a manifest's other fields."""
    return files.text_checksum(json.dumps(fields, sort_keys=True))
