"""Durable files: a temporary name, fsync, rename, fsync of the folder; a name is old or new, never half."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..writing import writing

FORMAT_VERSION = 1


class StoreError(ValueError):
    """A file of a run folder that cannot be used: one line, with its name and the way out."""


class FormatError(StoreError):
    """A whole file in a format that this code does not read."""


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place, durably, when the block ends well.

    Raises Unwritable when the disk is full, for instance.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # what a kill has left, or a link that leads out of the folder
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # on a file system that has become read-only nothing can be removed
                temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Make ``content`` the file ``path``; a crash leaves what was there before."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def copy_atomic(source: Path, target: Path) -> None:
    """Make ``target`` a copy of ``source``; a crash leaves what was there before."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def checksum(text: str) -> str:
    """The 16-byte BLAKE2b checksum of a text in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest(path: Path) -> str:
    """The file's 16-byte BLAKE2b checksum in hexadecimal, read as a stream."""
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def plain_name(name: str) -> str:
    """``name`` itself, when it names a file of its own folder on every system; else StoreError."""
    if name in ("", ".", "..") or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
        raise StoreError(f"{name!r} is not a plain file name; a checkpoint may not point outside its folder")
    return name


def check_format(path: Path, version: object) -> None:
    """Raise FormatError unless ``version``, found in the file ``path``, is one this code reads."""
    if version is None:
        raise FormatError(f"{path}: no format_version, so not a file of fedlora_mpi")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format {version}, this fedlora_mpi reads {FORMAT_VERSION}; use the one that wrote it"
        )
