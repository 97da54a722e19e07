"""``manifest.json``, whose presence makes a folder a checkpoint: what the other files must be to be used."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from . import files
from .files import StoreError

NAME = "manifest.json"


def worker_file(worker: int, kind: int = 0) -> str:
    """The name of a worker's file of the clients of one kind, whose leaves have equal shapes."""
    return f"worker-{worker:04d}{f'-{kind}' if kind else ''}.h5"


def is_worker_file(name: str) -> bool:
    """Whether ``name`` is one that ``worker_file`` gives."""
    return name.startswith("worker-")


@dataclass(frozen=True)
class Shard:
    """What the manifest records of one file: its name in the folder, bytes, and BLAKE2b checksum."""

    name: str
    size: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "Shard":
        """The record of the file as it is now."""
        return cls(path.name, path.stat().st_size, files.digest(path))

    def numbers(self) -> np.ndarray:
        """[3] int64, size and checksum, for a gather of buffers; ``from_numbers`` undoes it."""
        return np.frombuffer(self.size.to_bytes(8, "little") + bytes.fromhex(self.digest), np.int64)

    @classmethod
    def from_numbers(cls, name: str, numbers: np.ndarray) -> "Shard":
        """The record that ``numbers`` came from; the name follows from the sender (``worker_file``)."""
        return cls(name, int(numbers[0]), np.ascontiguousarray(numbers[1:], np.int64).tobytes().hex())

    def verify(self, folder: Path) -> None:
        """Raise StoreError unless the file in ``folder`` is the one recorded; reads it whole."""
        path = folder / self.name
        if not path.is_file():
            raise StoreError(f"{path}: missing file")
        if path.stat().st_size != self.size:
            raise StoreError(
                f"{path}: size differs ({path.stat().st_size} bytes, the manifest says {self.size})"
            )
        if files.digest(path) != self.digest:
            raise StoreError(f"{path}: checksum differs, the file is damaged")


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's round, the digest of the config that made it, its number of clients and its files."""

    round: int
    run_digest: str
    clients: int
    files: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Commit ``folder``: the rename inside is the moment at which it becomes a checkpoint."""
        text = json.dumps({"format_version": files.FORMAT_VERSION, **asdict(self)}, indent=1)
        files.write_atomic(folder / NAME, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of ``folder``. Raises StoreError: missing, damaged, newer, or pointing elsewhere."""
        path = folder / NAME
        try:
            fields = json.loads(path.read_bytes())
            files.check_format(path, fields.pop("format_version", None))
            shards = tuple(Shard(**shard) for shard in fields.pop("files"))
            manifest = cls(**fields, files=shards)
            for shard in shards:
                files.plain_name(shard.name)
        except StoreError as why:
            raise StoreError(str(why) if str(path) in str(why) else f"{path}: {why}") from why
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as why:
            raise StoreError(f"{path}: missing or damaged ({why!r})") from why
        if folder.name != f"{manifest.round:06d}":
            raise StoreError(f"{path}: of round {manifest.round}, in the folder of another")
        if absent := {"server.h5", "log.h5", "personal.h5"} - {shard.name for shard in shards}:
            raise StoreError(f"{path}: does not list {min(absent)}")
        return manifest
