"""The description of a sweep, ``SWEEP/sweep.json``: which runs belong to it, and what they vary."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import nolinks
from .files import StoreError, check_format, open_for_reading, write_atomic

SWEEP_FILE = "sweep.json"
STUDY_FILE = "study.log"  # of a search
FORMAT_VERSION = 1


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` is that of a sweep."""
    return (folder / SWEEP_FILE).is_file()


def refuse_sweep(folder: Path) -> None:
    """Raise StoreError if ``folder`` is that of a sweep, where a run folder is needed."""
    if is_sweep(folder):
        raise StoreError(
            f"{folder}: is the folder of a sweep, not of a run; give one of the run folders in it, "
            "see all of them by report, or go on with the same sweep command"
        )


def add_runs(folder: Path, config: str, runs: Mapping[str, Mapping[str, str]]) -> None:
    """Write a sweep's description; runs that an earlier call has added stay.

    config: the file of the config. runs: {run folder, relative to ``folder``: {key: value}}. Raises
    StoreError if the folder has a description that cannot be read.
    """
    with nolinks.open_folder(folder, folder.parent, create=True):
        pass
    known = read_description(folder)["runs"] if is_sweep(folder) else {}
    description = {
        "format_version": FORMAT_VERSION,
        "config": config,
        "runs": known | {name: dict(values) for name, values in runs.items()},
    }
    write_atomic(folder / SWEEP_FILE, json.dumps(description, indent=1).encode())


def read_description(folder: Path) -> dict[str, Any]:
    """Return what ``add_runs`` has written. Raises StoreError."""
    path = folder / SWEEP_FILE
    with open_for_reading(path) as file:
        content = file.read()
    try:
        description = json.loads(content)
        version, runs = description.get("format_version"), description["runs"]
        is_valid = all(
            isinstance(values, dict) and not _leads_out(name) for name, values in runs.items()
        )
    except (ValueError, LookupError, AttributeError) as why:
        raise StoreError(f"{path}: is no description of a sweep ({why}); remove it") from why
    check_format(path, version)
    if not is_valid:
        raise StoreError(f"{path}: names a run outside its folder; remove it")
    return description


def _leads_out(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or ".." in path.parts


def expand_sweeps(paths: Sequence[Path]) -> list[Path]:
    """Return the paths with the runs of a sweep in place of its folder.

    A run that has not begun is left out. Raises StoreError for a sweep without any run.
    """
    runs: list[Path] = []
    for path in paths:
        if not is_sweep(path):
            runs.append(path)
            continue
        described = read_description(path)["runs"]
        begun = [path / name for name in described if (path / name / "log.h5").is_file()]
        if not begun:
            raise StoreError(f"{path}: none of its {len(described)} runs has begun")
        runs += begun
    return runs


def wanted_runs(paths: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return {folder of a sweep: the run folders that are to be done} of those paths that are one.

    A search wants none: it gives up runs before their last round. Raises StoreError.
    """
    return {
        path: []
        if (path / STUDY_FILE).is_file()
        else [path / name for name in read_description(path)["runs"]]
        for path in paths
        if is_sweep(path)
    }
