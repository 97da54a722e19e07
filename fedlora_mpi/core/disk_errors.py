"""A write that fails: which file, why, and how much room there is."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .units import format_bytes


class WriteError(OSError):
    """A file or folder that could not be written, in one line."""

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
        errno_match = re.search(r"errno = (\d+)", str(why))  # HDF5's, which h5py raises as either
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
    """The room in the folder of ``path``, or in what exists of the way to it."""
    folder = next(at for at in path.absolute().parents if at.is_dir())
    return f"{format_bytes(shutil.disk_usage(folder).free)} free in {folder}"
