"""Replace a run folder by a new one, if it has nothing but files of a run.

The old folder is first renamed to ``.NAME.old``, then the new one takes its name, then the old
files are removed. So a start that fails leaves the old run in its place.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.disk_errors import explain_write_errors
from . import checkpoint, manifest, nolinks
from .files import StoreError, fsync
from .lock import hold_lock
from .reader import RunFiles
from .run_folder import SUBFOLDERS, checkpoint_folders, is_run_file


def check_replaceable(run: Path) -> None:
    """Raise StoreError unless ``run`` is a run folder with no files but those of a run."""
    remedy = "so it is not replaced; move it away or choose another output"
    if run.is_symlink() or run.name in ("", ".."):
        raise StoreError(f"{run}: is a link or a place, not the name of a run folder, {remedy}")
    try:
        RunFiles(run)  # raises StoreError if there is no log that this program wrote
        is_run = (run / "config.yaml").is_file()
        foreign = next(_foreign_entries(run), None)
    except OSError as why:
        raise StoreError(f"{run}: {why.strerror or why}, {remedy}") from why
    if not is_run:
        raise StoreError(f"{run}: not a run folder, it has no config.yaml, {remedy}")
    if foreign:
        raise StoreError(f"{run}: {foreign.relative_to(run)} is not of a run, {remedy}")


def has_no_round(run: Path) -> bool:
    """Return whether a run folder could be replaced without a loss: no round of it was finished."""
    try:
        check_replaceable(run)
        return not checkpoint.committed_rounds(run) and not len(RunFiles(run).rounds()["round"])
    except StoreError:
        return False


@contextmanager
def set_aside(run: Path) -> Iterator[None]:
    """Inside, ``run`` has another name; after the block it is removed, or back if the block fails.

    Raises StoreError if it is in use or has other files, WriteError.
    """
    old = run.with_name(f".{run.name}.old")
    with hold_lock(run):
        check_replaceable(run)
        if os.path.lexists(old):  # of a start that was killed
            _clear(old)
        with explain_write_errors(run):
            os.rename(run, old)
        try:
            yield
        except BaseException:
            with suppress(OSError):
                os.rename(old, run)
            raise
        with explain_write_errors(run):
            fsync(run.parent)
        _clear(old)


def _clear(old: Path) -> None:
    """Remove the files of a run and their folders. Raises StoreError if others are there."""
    parent = old.parent
    with explain_write_errors(old):
        is_gone = not next(_foreign_entries(old), None)
        if is_gone:
            for folder, is_ours in _folders(old):
                nolinks.clear_folder(folder, is_ours, parent)
            is_gone = nolinks.clear_folder(old, is_run_file, parent)
    if not is_gone:
        raise StoreError(f"{old}: has files that are not of a run; move it away")


def _folders(run: Path) -> list[tuple[Path, Callable[[str], bool]]]:
    """Return the folders of a run that are there, inner ones first, and which files are theirs."""
    folders = [(folder, manifest.is_checkpoint_file) for folder in checkpoint_folders(run)]
    return folders + [
        (run / name, is_ours) for name, is_ours in SUBFOLDERS.items() if os.path.lexists(run / name)
    ]


def _foreign_entries(run: Path) -> Iterator[Path]:
    """Yield what is in a run folder and not of a run. Raises WrongFileType, OSError."""
    folders = _folders(run)
    known = {folder for folder, _ in folders}
    for folder, is_ours in [*folders, (run, is_run_file)]:
        for name in nolinks.foreign_names(folder, is_ours, run.parent):
            if folder / name not in known:
                yield folder / name
