"""Check whether processes on different nodes see the same folder."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.disk_errors import explain_write_errors
from .run_folder import explain_create_errors

VISIBILITY_TIMEOUT = 2.0  # seconds within which a file of another node must appear


@contextmanager
def create_probe(run: Path) -> Iterator[Path]:
    """Yield the path of a new empty file in ``run``, or in its parent if ``run`` does not exist.

    Its random name was never used before. The file is removed after the block. Folders that were
    created for it are removed if the block fails. Raises StoreError, WriteError.
    """
    parent = run if run.is_dir() else run.parent
    path, new_folders = parent / f".fedlora-mpi.{secrets.token_hex(8)}", []
    try:
        with explain_create_errors(run):
            for folder in reversed((parent, *parent.parents)):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    new_folders.append(folder)
        with explain_write_errors(run) if parent == run else explain_create_errors(run):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
    except BaseException:
        for folder in reversed(new_folders):
            with suppress(OSError):  # another process may have put a file there
                folder.rmdir()
        raise


def wait_for_file(path: Path) -> bool:
    """Return whether a file appears within ``VISIBILITY_TIMEOUT`` seconds."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not os.path.isfile(path):
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):  # NFS asks its server again when a folder is opened
            os.close(os.open(path.parent, os.O_RDONLY))
        time.sleep(0.05)
    return True
