"""Tell scripts whether a run is done: ``fedlora-mpi status``."""

from collections.abc import Sequence
from pathlib import Path

from .. import config as configs
from ..core.paths import expand_home
from ..experiment.output import adopt_recorded_engine
from ..store import checkpoint
from ..store.files import StoreError
from ..store.sweep_folder import refuse_sweep


def run_progress(target: Path, overrides: Sequence[str]) -> tuple[Path, int, int]:
    """Return (run folder, rounds of the newest valid checkpoint, rounds in all).

    ``target`` is a run folder or a config. A run folder is read without importing the classes that
    its config names. A config whose run has not begun has 0 rounds done. Raises ValueError if
    ``target`` is neither, or if the run in the config's folder has other settings than the config.
    """
    if target.is_dir():
        refuse_sweep(target)
        return (
            target,
            _checkpoint_round(target),
            configs.read_recorded_rounds(target / "config.yaml", overrides),
        )
    config = configs.read(target, overrides)
    folder = expand_home(config.output)
    if not (folder / "config.yaml").is_file():
        return folder, 0, config.rounds
    return (
        folder,
        _checkpoint_round(folder),
        adopt_recorded_engine(config, str(target), folder).rounds,
    )


def _checkpoint_round(folder: Path) -> int:
    """Return the round of the newest checkpoint with correct checksums; 0 if there is none."""
    if not checkpoint.committed_rounds(folder):
        return 0
    try:
        return checkpoint.newest_valid(folder)[0].round
    except StoreError:  # a resume reports what is wrong with each checkpoint
        return 0
