"""A new run folder: there as a whole, with its config and its log, or not there at all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..writing import writing
from .files import StoreError, fsync
from .lock import locked


@contextmanager
def created(folder: Path, fill: Callable[[Path], None]) -> Iterator[None]:
    """Make ``folder`` with the files that ``fill`` writes, and hold its lock during the block.

    It is filled under the name ``.NAME.new`` and then renamed; what a killed start has left there is removed.
    Raises StoreError when it cannot be made, is there, or is about to be made by another process; Unwritable.
    """
    draft = folder.with_name(f".{folder.name}.new")
    with creating(folder):
        draft.mkdir(parents=True, exist_ok=True)
    with locked(draft):
        try:
            with writing(folder):
                for left in draft.iterdir():
                    if left.name != ".lock":
                        left.unlink()
                fill(draft)
            with creating(folder):
                draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        with writing(folder):
            fsync(folder.parent)
        yield


@contextmanager
def creating(folder: Path) -> Iterator[None]:
    """What the system refuses inside becomes one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"output = {folder}: cannot be created: {error.strerror}; choose another") from error
