"""Durable files: write under a temporary name, fsync, rename, fsync the folder.

A file therefore has either its old or its new content, never a part of it.
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
    """A file of a run folder cannot be used. The message is one line: file, reason, way out."""


class FormatError(StoreError):
    """An intact file has a format that this version does not read."""


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replace_file(path: Path, root: Path | None = None) -> Iterator[BinaryIO]:
    """Yield an empty temporary file, which replaces ``path`` durably if the block succeeds.

    root: the folder below which links are refused, see ``nolinks``. Raises WriteError, for example
    when the disk is full or when ``path`` is not a file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_write_errors(path), nolinks.open_folder(path.parent, root) as folder_handle:
        nolinks.exists(folder_handle, path)
        if nolinks.exists(folder_handle, temporary):  # left by a killed process
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
            # removal fails if the file system has become read-only
            with suppress(OSError):
                os.unlink(temporary.name, dir_fd=folder_handle)
            raise
        os.fsync(folder_handle)


def write_atomic(path: Path, content: bytes, root: Path | None = None) -> None:
    """Write ``content`` to the file ``path``. A crash leaves the old file intact."""
    with replace_file(path, root) as file:
        file.write(content)


def copy_atomic(source: Path, target: Path, root: Path | None = None) -> None:
    """Copy ``source`` to ``target``. A crash leaves the old target intact.

    ``root`` applies to both files. Raises StoreError when ``source`` is not a file.
    """
    with open_for_reading(source, root) as file, replace_file(target, root) as copy:
        copyfileobj(file, copy, 1 << 20)


def open_for_reading(path: Path, root: Path | None = None) -> BinaryIO:
    """Return a file of ours, open for reading.

    Raises StoreError when it is not a regular file, and OSError when it does not exist.
    """
    try:
        return open(nolinks.open_handle(path, os.O_RDONLY, root), "rb")
    except nolinks.WrongFileType as why:
        raise StoreError(str(why)) from why


def text_checksum(text: str) -> str:
    """Return the 16-byte BLAKE2b checksum of a text, in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path, root: Path | None = None) -> str:
    """Return the 16-byte BLAKE2b checksum of a file, in hexadecimal.

    The file is read in blocks of 1 MiB. Raises StoreError, OSError.
    """
    hasher = hashlib.blake2b(digest_size=16)
    with open_for_reading(path, root) as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def check_plain_name(name: str) -> str:
    """Return ``name`` if it is a plain file name on every system. Raises StoreError otherwise."""
    if name in ("", ".", "..") or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
        raise StoreError(
            f"{name!r} is not a plain file name; a checkpoint may not point outside its folder"
        )
    return name


def check_format(path: Path, version: object) -> None:
    """Raise FormatError unless this code reads format ``version``, which file ``path`` states."""
    if version is None:
        raise FormatError(f"{path}: no format_version, so not a file of fedlora_mpi")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format {version}, this fedlora_mpi reads {FORMAT_VERSION}; use the one that "
            "wrote it"
        )
