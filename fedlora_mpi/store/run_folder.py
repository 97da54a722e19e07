"""A run folder: a new one is there as a whole, with its config and its log, or not at all; an old
one is as we made it.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.disk_errors import explain_write_errors
from . import manifest, nolinks
from .files import StoreError, fsync
from .lock import locked

_FILES = r"(config\.yaml|log\.h5|rounds\.csv|vocabulary\.json|network-\d+\.json)"


def is_ours(name: str) -> bool:
    """Whether a file of this name is one of a run folder, or one that a killed writer has left of
    it.
    """
    return bool(re.fullmatch(rf"\.lock|{_FILES}|\.{_FILES}\.tmp", name))


_FOLDERS: dict[str, Callable[[str], bool]] = {  # of a run: which of the files in them are ours
    "checkpoints": lambda name: False,
    "tensorboard": lambda name: name.startswith("events"),
    ".pulse": lambda name: bool(re.fullmatch(r"\d+|\.\d+\.tmp", name)),
}


def check(run: Path) -> None:
    """Raise StoreError when something in a run folder that has the name of a file or a folder of
    ours is a link, or whatever else cannot be written in its place. Files of other names are the
    user's.
    """
    ours = {run: is_ours} | {run / name: is_file for name, is_file in _FOLDERS.items()}
    try:
        ours |= {folder: manifest.is_ours for folder in _rounds(run)}
        for folder, is_file in ours.items():
            nolinks.check(folder, is_file, run)
    except OSError as why:
        raise StoreError(
            str(why) if isinstance(why, nolinks.Misplaced) else f"{run}: {why.strerror}"
        ) from why


def _rounds(run: Path) -> list[Path]:
    """What has the name of a checkpoint, or of one that was set aside."""
    home = run / "checkpoints"
    with suppress(FileNotFoundError), nolinks.opened_folder(home, run) as handle:
        return sorted(
            home / name for name in os.listdir(handle) if re.fullmatch(r"\d{6,}(\.aside.*)?", name)
        )
    return []


@contextmanager
def created(folder: Path, fill: Callable[[Path], None]) -> Iterator[None]:
    """Make ``folder`` with the files that ``fill`` writes, and hold its lock during the block.

    It is filled under the name ``.NAME.new`` and then renamed; what a killed start has left there
    is removed. Raises StoreError when it cannot be made, is there, or is about to be made by
    another process; Unwritable.
    """
    draft, home = folder.with_name(f".{folder.name}.new"), folder.parent
    with creating(folder), nolinks.opened_folder(draft, home, make=True):
        strange = nolinks.strangers(draft, is_ours, home)
    if strange:
        raise StoreError(
            f"{draft / strange[0]}: is not of a run, and {draft} must become one; move it away"
        )
    with locked(draft, home):
        try:
            with explain_write_errors(folder):
                for name in {*filter(is_ours, os.listdir(draft))} - {".lock"}:
                    nolinks.remove(draft / name, home)
                fill(draft)
            with creating(folder):
                draft.rename(folder)
        except BaseException:
            with suppress(OSError):
                nolinks.clear(draft, is_ours, home)
            raise
        with explain_write_errors(folder):
            fsync(home)
        yield


@contextmanager
def creating(folder: Path) -> Iterator[None]:
    """What the system refuses inside becomes one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"output = {folder}: cannot be created: {error.strerror}; choose another"
        ) from error
