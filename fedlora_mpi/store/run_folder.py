"""Create and check a run folder.

A new run folder appears complete, with its config and its log, or not at all. In an old one, all
entries with names of ours must be files of the expected type.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from ..core.disk_errors import explain_write_errors
from . import manifest, nolinks
from .files import StoreError, fsync
from .lock import hold_lock

_FILE_PATTERN = r"(config\.yaml|log\.h5|rounds\.csv|vocabulary\.json|network-\d+\.json)"


def is_run_file(name: str) -> bool:
    """Return whether a run folder has a file of this name, or a killed writer may have left one."""
    return bool(re.fullmatch(rf"\.lock|{_FILE_PATTERN}|\.{_FILE_PATTERN}\.tmp", name))


# subfolder of a run -> whether a file name in it is ours
SUBFOLDERS: dict[str, Callable[[str], bool]] = {
    "checkpoints": lambda name: False,
    "tensorboard": lambda name: name.startswith("events"),
    ".pulse": lambda name: bool(re.fullmatch(r"\d+|\.\d+\.tmp", name)),
}


def check_run_folder(run: Path) -> None:
    """Raise StoreError when an entry with a name of ours is a link or has an unexpected type.

    Files of other names belong to the user and are not checked.
    """
    file_tests = {run: is_run_file} | {run / name: is_file for name, is_file in SUBFOLDERS.items()}
    try:
        file_tests |= {folder: manifest.is_checkpoint_file for folder in checkpoint_folders(run)}
        for folder, is_file in file_tests.items():
            nolinks.check_entries(folder, is_file, run)
    except OSError as why:
        raise StoreError(
            str(why) if isinstance(why, nolinks.WrongFileType) else f"{run}: {why.strerror}"
        ) from why


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the entries that are named like a checkpoint, or like one that was set aside."""
    checkpoints = run / "checkpoints"
    with suppress(FileNotFoundError), nolinks.open_folder(checkpoints, run) as handle:
        return sorted(
            checkpoints / name
            for name in os.listdir(handle)
            if re.fullmatch(r"\d{6,}(\.aside.*)?", name)
        )
    return []


@contextmanager
def create_run_folder(
    folder: Path,
    fill: Callable[[Path], None],
    make_room: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[None]:
    """Create ``folder`` with the files that ``fill`` writes, and hold its lock during the block.

    make_room: a block in which the name is free.

    It is filled under the name ``.NAME.new`` and then renamed. Files of a killed start are removed
    from there. Raises StoreError when the folder cannot be created, exists already, or another
    process is creating it; raises WriteError.
    """
    draft, parent = folder.with_name(f".{folder.name}.new"), folder.parent
    with explain_create_errors(folder), nolinks.open_folder(draft, parent, create=True):
        foreign_names = nolinks.foreign_names(draft, is_run_file, parent)
    if foreign_names:
        raise StoreError(
            f"{draft / foreign_names[0]}: is not of a run, and {draft} must become one; move it "
            "away"
        )
    with hold_lock(draft, parent):
        try:
            with explain_write_errors(folder):
                for name in {*filter(is_run_file, os.listdir(draft))} - {".lock"}:
                    nolinks.remove(draft / name, parent)
                fill(draft)
            with make_room(), explain_create_errors(folder):
                draft.rename(folder)
        except BaseException:
            with suppress(OSError):
                nolinks.clear_folder(draft, is_run_file, parent)
            raise
        with explain_write_errors(folder):
            fsync(parent)
        yield


@contextmanager
def explain_create_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError with one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"output = {folder}: cannot be created: {error.strerror}; choose another"
        ) from error
