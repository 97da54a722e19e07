"""Durable files: a temporary name, fsync, rename, fsync of the folder; a name is old or new, never
half.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from shutil import copyfileobj
from typing import BinaryIO

from ..core.disk_errors import explain_write_errors
from . import nolinks

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
def replace_file(path: Path, root: Path | None = None) -> Iterator[BinaryIO]:
    """An empty file beside ``path``, which takes its place, durably, when the block ends well.

    root: from where on no folder may be a link, see ``nolinks``. Raises WriteError when the disk
    is full, for instance, and where ``path`` is no file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_write_errors(path), nolinks.open_folder(path.parent, root) as folder_handle:
        nolinks.exists(folder_handle, path)
        if nolinks.exists(folder_handle, temporary):  # what a kill has left
            os.unlink(temporary.name, dir_fd=folder_handle)
        handle = os.open(
            temporary.name,
            os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW,
            0o666,
            dir_fd=folder_handle,
        )
        try:
            with open(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(handle)
            os.replace(
                temporary.name, path.name, src_dir_fd=folder_handle, dst_dir_fd=folder_handle
            )
        except BaseException:
            # on a file system that has become read-only nothing can be removed
            with suppress(OSError):
                os.unlink(temporary.name, dir_fd=folder_handle)
            raise
        os.fsync(folder_handle)


def write_atomic(path: Path, content: bytes, root: Path | None = None) -> None:
    """Make ``content`` the file ``path``; a crash leaves what was there before."""
    with replace_file(path, root) as file:
        file.write(content)


def copy_atomic(source: Path, target: Path, root: Path | None = None) -> None:
    """Make ``target`` a copy of ``source``; a crash leaves what was there before.

    ``root`` holds for both. Raises StoreError when ``source`` is no file.
    """
    with open_for_reading(source, root) as file, replace_file(target, root) as copy:
        copyfileobj(file, copy, 1 << 20)


def open_for_reading(path: Path, root: Path | None = None) -> BinaryIO:
    """A file of ours, open for reading. Raises StoreError when it is something else, OSError when
    it is not there.
    """
    try:
        return open(nolinks.open_handle(path, os.O_RDONLY, root), "rb")
    except nolinks.WrongFileType as why:
        raise StoreError(str(why)) from why


def text_checksum(text: str) -> str:
    """The 16-byte BLAKE2b checksum of a text in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path, root: Path | None = None) -> str:
    """The file's 16-byte BLAKE2b checksum in hexadecimal, read as a stream. Raises StoreError,
    OSError.
    """
    hasher = hashlib.blake2b(digest_size=16)
    with open_for_reading(path, root) as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def check_plain_name(name: str) -> str:
    """``name`` itself, when it names a file of its own folder on every system; else StoreError."""
    if name in ("", ".", "..") or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
        raise StoreError(
            f"{name!r} is not a plain file name; a checkpoint may not point outside its folder"
        )
    return name


def check_format(path: Path, version: object) -> None:
    """Raise FormatError unless ``version``, found in the file ``path``, is one this code reads."""
    if version is None:
        raise FormatError(f"{path}: no format_version, so not a file of fedlora_mpi")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format {version}, this fedlora_mpi reads {FORMAT_VERSION}; use the one that "
            "wrote it"
        )
