"""``fedlora-mpi status``: whether a run is done, for scripts."""

from collections.abc import Sequence
from pathlib import Path

from .. import config as configs
from ..core.paths import expand_home
from ..run.output import adopt_recorded_engine
from ..store import checkpoint
from ..store.files import StoreError


def run_progress(target: Path, overrides: Sequence[str]) -> tuple[Path, int, int]:
    """(run folder, rounds that a whole checkpoint holds, rounds in all) of a run folder, or of the
    run of a config.

    A run folder is read without its classes. A config's run that has not begun has 0. Raises
    ValueError where ``target`` is neither, or where the run in the folder has other settings than
    the config.
    """
    if target.is_dir():
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
    """The rounds of the newest checkpoint whose checksums hold."""
    if not checkpoint.committed_rounds(folder):
        return 0
    try:
        return checkpoint.newest_valid(folder)[0].round
    except StoreError:  # a resume says what is wrong with each
        return 0
