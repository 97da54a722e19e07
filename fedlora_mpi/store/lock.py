"""The lock of a run folder: only one run may use it at a time.

The kernel releases the lock when the process ends, however it ends.
"""

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.disk_errors import explain_write_errors
from . import nolinks
from .files import StoreError

# seconds after each attempt: ``is_held`` holds the lock for a moment
_RETRY_DELAYS = (0.01, 0.02, 0.05, 0.0)
# Lustre mounted without flock, some NFS
UNSUPPORTED_ERRNOS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def hold_lock(run: Path, root: Path | None = None) -> Iterator[None]:
    """Hold ``RUN/.lock`` during the block. Warns and continues if the file system has no locks.

    root: see ``nolinks``. Raises StoreError, with host and pid, when another process holds the
    lock.
    """
    path = Path(run) / ".lock"
    with explain_write_errors(path):
        handle = nolinks.open_handle(path, os.O_RDWR | os.O_CREAT, root)
    try:
        if os.fstat(handle).st_nlink > 1:
            raise StoreError(
                f"{path}: is one file with another name (a hard link), which a run would write "
                "to; remove it"
            )
        _acquire(path, handle)
        with explain_write_errors(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def is_held(run: Path) -> bool | None:
    """Return whether a process holds the lock of a run, so that it is going on; None: unknown.

    The lock is tried for a moment, shared, so that readers do not see each other.
    """
    try:
        handle = nolinks.open_handle(Path(run) / ".lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _acquire(path: Path, handle: int) -> None:
    """Lock the open file ``handle`` and return soon. Raises StoreError when it is in use."""
    for seconds in _RETRY_DELAYS:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(seconds)
        except OSError as why:
            if why.errno not in UNSUPPORTED_ERRNOS:
                raise
            warnings.warn(
                f"{path}: this file system has no locks; start no second run in this folder",
                stacklevel=4,
            )
            return
    owner = os.pread(handle, 1000, 0).decode().strip() or "another process"
    raise StoreError(f"{path}: in use by {owner}; wait for it, stop it, or choose another output")
