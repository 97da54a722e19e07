"""Opens, makes and removes what lies below a folder that the user has named, and follows no link
there.

That folder itself and those above it may be links: they are the user's choice. Below it a link, a
FIFO or a device would lead a write elsewhere, or make it wait for ever; each is refused, and
nothing is removed that is no file.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.disk_errors import WriteError

_KINDS = {
    "a link": stat.S_ISLNK, "a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a file": stat.S_ISREG,
}  # fmt: skip


class Misplaced(WriteError, ValueError):
    """Something else where a file or a folder of ours is, or would be: one line."""

    def __init__(self, path: Path, mode: int, wanted: str) -> None:
        kind = next((name for name, test in _KINDS.items() if test(mode)), "something strange")
        text = (
            f"{path} is {kind} where {wanted} of ours would be; it is left as it is, move it away"
        )
        super().__init__(errno.ELOOP, text, str(path))

    def __str__(self) -> str:
        return self.strerror


@contextmanager
def opened_folder(folder: Path, below: Path | None = None, make: bool = False) -> Iterator[int]:
    """A handle of ``folder`` during the block; what leads to it from ``below`` (default: itself)
    are real folders.

    make: make those of them, and those above, that are not there. Raises Misplaced, OSError.
    """
    way = folder if below is None else below
    if make:
        way.mkdir(parents=True, exist_ok=True)
    parts = folder.relative_to(way).parts
    assert ".." not in parts, f"{folder} leads out of {way}"
    handle = os.open(way, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in parts:
            way = way / name
            inner = _inside(handle, way, make)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _inside(home: int, folder: Path, make: bool) -> int:
    """A handle of a folder in the one with the handle ``home``."""
    if not is_there(home, folder, "a folder") and make:
        os.mkdir(folder.name, dir_fd=home)
        os.fsync(home)
    return os.open(folder.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=home)


def is_there(home: int, path: Path, wanted: str = "a file") -> bool:
    """Whether ``path`` is in the folder with the handle ``home``. Raises Misplaced when it is not
    ``wanted``.
    """
    try:
        mode = os.stat(path.name, dir_fd=home, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    if not _KINDS[wanted](mode):
        raise Misplaced(path, mode, wanted)
    return True


def opened(path: Path, flags: int, below: Path | None = None) -> int:
    """A handle of the file ``path``, by default of any folder. Raises Misplaced, OSError."""
    with opened_folder(path.parent, below) as home:
        is_there(home, path)
        handle = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=home)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):  # it has changed since
        os.close(handle)
        raise Misplaced(path, mode, "a file")
    return handle


def remove(path: Path, below: Path | None = None) -> None:
    """Remove the file ``path`` if it is there. Raises Misplaced, OSError."""
    with opened_folder(path.parent, below) as home:
        if is_there(home, path):
            os.unlink(path.name, dir_fd=home)


def check(folder: Path, is_ours: Callable[[str], bool], below: Path | None = None) -> None:
    """Raise Misplaced unless the folder, if it is there, and what in it has the name of a file of
    ours are just that.
    """
    with suppress(FileNotFoundError), opened_folder(folder, below) as home:
        for name in filter(is_ours, os.listdir(home)):
            is_there(home, folder / name)


def strangers(folder: Path, is_ours: Callable[[str], bool], below: Path) -> list[str]:
    """The names in ``folder`` that are not ours, or are no files. Raises Misplaced, OSError."""
    with opened_folder(folder, below) as home, os.scandir(home) as found:
        return sorted(
            entry.name
            for entry in found
            if not (is_ours(entry.name) and entry.is_file(follow_symlinks=False))
        )


def clear(folder: Path, is_ours: Callable[[str], bool], below: Path, first: str = "") -> bool:
    """Remove the files of ours in ``folder``, then the folder; whether it is gone, having had
    nothing else.

    first: the file that goes before all others, durably. Raises Misplaced, OSError.
    """
    with opened_folder(folder, below) as home:
        with os.scandir(home) as found:
            names = {
                entry.name
                for entry in found
                if is_ours(entry.name) and entry.is_file(follow_symlinks=False)
            }
        if first in names:
            os.unlink(first, dir_fd=home)
            os.fsync(home)
        for name in sorted(names - {first}):
            os.unlink(name, dir_fd=home)
    with opened_folder(folder.parent, below) as home:
        try:
            os.rmdir(folder.name, dir_fd=home)
        except OSError as why:
            if why.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True
