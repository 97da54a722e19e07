"""Errors of failed writes: which file, why, and how much space is free."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .units import format_bytes


class WriteError(OSError):
    """A failed write to a file or folder, in one line."""

    def __str__(self) -> str:
        return (
            f"{self.filename}: cannot be written: {self.strerror}; mend that and go on "
            "('fedlora-mpi resume' continues a run from its last checkpoint)"
        )


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Raise WriteError when the system or HDF5 refuses a write to ``path``."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError) as why:
        errno_match = re.search(r"errno = (\d+)", str(why))  # of HDF5, raised as either type
        if errno_match:
            code = int(errno_match[1])
        elif isinstance(why, OSError):
            code = why.errno or errno.EIO
        else:
            raise
        raise WriteError(
            code, f"{os.strerror(code)}, {_free_space(Path(path))}", str(path)
        ) from why


def _free_space(path: Path) -> str:
    """Free space in the folder of ``path``, or in the nearest folder above that exists."""
    folder = next(at for at in path.absolute().parents if at.is_dir())
    return f"{format_bytes(shutil.disk_usage(folder).free)} free in {folder}"
