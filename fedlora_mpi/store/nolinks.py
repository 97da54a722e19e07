"""Open, create and remove files below a folder of the user, without following links.

The folder itself and its parents may be links, since the user has chosen them. Below it, a link, a
FIFO or a device could redirect a write or block it for ever. Each of them is refused, and only
regular files and empty folders are removed.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.disk_errors import WriteError

_TYPE_TESTS = {
    "a link": stat.S_ISLNK,
    "a folder": stat.S_ISDIR,
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a file": stat.S_ISREG,
}


class WrongFileType(WriteError, ValueError):
    """Something else is where a file or a folder of ours should be. The message is one line."""

    def __init__(self, path: Path, mode: int, expected: str) -> None:
        actual = next(
            (name for name, test in _TYPE_TESTS.items() if test(mode)), "something strange"
        )
        text = (
            f"{path} is {actual} where {expected} of ours would be; it is left as it is, move it "
            "away"
        )
        super().__init__(errno.ELOOP, text, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def open_folder(folder: Path, root: Path | None = None, create: bool = False) -> Iterator[int]:
    """Yield a handle of ``folder``; no folder below ``root`` on the way to it may be a link.

    root: by default ``folder`` itself, which may be a link; create: make missing folders, also
    those above ``root``. Raises WrongFileType, OSError.
    """
    current = folder if root is None else root
    if create:
        current.mkdir(parents=True, exist_ok=True)
    parts = folder.relative_to(current).parts
    assert ".." not in parts, f"{folder} leads out of {current}"
    handle = os.open(current, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in parts:
            current = current / name
            subfolder_handle = _open_subfolder(handle, current, create)
            os.close(handle)
            handle = subfolder_handle
        yield handle
    finally:
        os.close(handle)


def _open_subfolder(parent_handle: int, folder: Path, create: bool) -> int:
    """Return a handle of ``folder``, whose parent has the handle ``parent_handle``."""
    if not exists(parent_handle, folder, "a folder") and create:
        os.mkdir(folder.name, dir_fd=parent_handle)
        os.fsync(parent_handle)
    return os.open(folder.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_handle)


def exists(folder_handle: int, path: Path, expected: str = "a file") -> bool:
    """Return whether ``path`` is in the folder. Raises WrongFileType if it is not ``expected``."""
    try:
        mode = os.stat(path.name, dir_fd=folder_handle, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    if not _TYPE_TESTS[expected](mode):
        raise WrongFileType(path, mode, expected)
    return True


def open_handle(path: Path, flags: int, root: Path | None = None) -> int:
    """Return a handle of the file ``path``. Raises WrongFileType, OSError.

    root: see ``open_folder``.
    """
    with open_folder(path.parent, root) as folder_handle:
        exists(folder_handle, path)
        handle = os.open(
            path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=folder_handle
        )
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):  # it was replaced after ``exists``
        os.close(handle)
        raise WrongFileType(path, mode, "a file")
    return handle


def remove(path: Path, root: Path | None = None) -> None:
    """Remove the file ``path`` if it exists. Raises WrongFileType, OSError."""
    with open_folder(path.parent, root) as folder_handle:
        if exists(folder_handle, path):
            os.unlink(path.name, dir_fd=folder_handle)


def check_entries(folder: Path, is_ours: Callable[[str], bool], root: Path | None = None) -> None:
    """Raise WrongFileType if ``folder`` is no folder, or an entry with a name of ours is no file.

    A missing folder is accepted.
    """
    with suppress(FileNotFoundError), open_folder(folder, root) as folder_handle:
        for name in filter(is_ours, os.listdir(folder_handle)):
            exists(folder_handle, folder / name)


def foreign_names(folder: Path, is_ours: Callable[[str], bool], root: Path) -> list[str]:
    """Return the entries of ``folder`` that do not have a name of ours or are no files.

    Raises WrongFileType, OSError.
    """
    with open_folder(folder, root) as folder_handle, os.scandir(folder_handle) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not (is_ours(entry.name) and entry.is_file(follow_symlinks=False))
        )


def clear_folder(
    folder: Path, is_ours: Callable[[str], bool], root: Path, first_name: str = ""
) -> bool:
    """Remove our files in ``folder``, then the folder if it is empty; return whether it is gone.

    first_name: the file to remove first, durably. Raises WrongFileType, OSError.
    """
    with open_folder(folder, root) as folder_handle:
        with os.scandir(folder_handle) as entries:
            names = {
                entry.name
                for entry in entries
                if is_ours(entry.name) and entry.is_file(follow_symlinks=False)
            }
        if first_name in names:
            os.unlink(first_name, dir_fd=folder_handle)
            os.fsync(folder_handle)
        for name in sorted(names - {first_name}):
            os.unlink(name, dir_fd=folder_handle)
    with open_folder(folder.parent, root) as folder_handle:
        try:
            os.rmdir(folder.name, dir_fd=folder_handle)
        except OSError as why:
            if why.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True
