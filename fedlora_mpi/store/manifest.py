"""``manifest.json``, whose presence makes a folder a checkpoint: what the other files must be to be
used.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from . import files, schema
from .files import StoreError

NAME = "manifest.json"
_MAX_BYTES = 64 << 20  # bytes; each worker has a hundred
_FILE_PATTERN = r"(manifest\.json|(server|log|personal|worker-\d{4,}(-\d+)?)\.h5)"


def worker_file(worker: int, client_type: int = 0) -> str:
    """The name of a worker's file of the clients of one kind, whose leaves have equal shapes."""
    return f"worker-{worker:04d}{f'-{client_type}' if client_type else ''}.h5"


def is_worker_file(name: str) -> bool:
    """Whether ``name`` is one that ``worker_file`` gives."""
    return name.startswith("worker-")


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name is one that a checkpoint has, or that a killed writer has left of
    one.
    """
    return bool(re.fullmatch(rf"{_FILE_PATTERN}|\.({_FILE_PATTERN})\.tmp", name))


def run_folder_of(folder: Path) -> Path:
    """The run folder of a checkpoint's."""
    return folder.parent.parent


@dataclass(frozen=True)
class Shard:
    """What the manifest records of one file: name in the folder, bytes, BLAKE2b checksum."""

    name: str
    size: int
    digest: str

    @classmethod
    def from_json(cls, block: object) -> "Shard":
        """The record of a file in the manifest. Raises StoreError."""
        if not isinstance(block, dict):
            raise StoreError(f"files: each must be a block, here is {type(block).__name__}")
        name, digest = (
            files.check_plain_name(schema.checked_item(block, "name", str)),
            schema.checked_item(block, "digest", str),
        )
        return cls(name, schema.checked_item(block, "size", int, 0), digest)

    @classmethod
    def from_file(cls, path: Path) -> "Shard":
        """The record of the file as it is now."""
        return cls(
            path.name, path.stat().st_size, files.file_digest(path, run_folder_of(path.parent))
        )

    def to_numbers(self) -> np.ndarray:
        """[3] int64, size and checksum, for a gather of buffers; ``from_numbers`` undoes it."""
        return np.frombuffer(self.size.to_bytes(8, "little") + bytes.fromhex(self.digest), np.int64)

    @classmethod
    def from_numbers(cls, name: str, numbers: np.ndarray) -> "Shard":
        """The record that ``numbers`` came from; the name follows from the sender
        (``worker_file``).
        """
        return cls(
            name, int(numbers[0]), np.ascontiguousarray(numbers[1:], np.int64).tobytes().hex()
        )

    def verify(self, folder: Path) -> None:
        """Raise StoreError unless the file in ``folder`` is the one recorded; reads it whole."""
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
    """A checkpoint's round, the digest of the config that made it, its number of clients and its
    files.
    """

    round: int
    run_digest: str
    clients: int
    files: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Commit ``folder``: the rename inside is the moment at which it becomes a checkpoint."""
        text = json.dumps({"format_version": files.FORMAT_VERSION, **asdict(self)}, indent=1)
        files.write_atomic(folder / NAME, text.encode(), run_folder_of(folder))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of ``folder``. Raises StoreError: missing, damaged, newer, or pointing
        elsewhere.
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
        if missing := {"server.h5", "log.h5", "personal.h5"} - {shard.name for shard in shards}:
            raise StoreError(f"{path}: does not list {min(missing)}")
        return manifest
