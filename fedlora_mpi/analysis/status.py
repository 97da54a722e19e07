"""``fedlora-mpi status``: whether a run is done, for scripts."""

from collections.abc import Sequence
from pathlib import Path

from .. import config as configs
from ..paths import expanded
from ..store.reader import RunFiles


def rounds_of(target: Path, overrides: Sequence[str]) -> tuple[Path, int, int]:
    """(run folder, rounds that a checkpoint holds, rounds in all) of a run folder, or of the run of a config.

    A config's run that has not begun has 0. Raises ValueError where ``target`` is neither.
    """
    if target.is_dir():
        config = configs.recorded(target / "config.yaml", overrides)
        folder = target
    else:
        config = configs.read(target, overrides)
        folder = expanded(config.output)
    saved = RunFiles(folder).checkpoints() if (folder / "config.yaml").is_file() else []
    return folder, max(saved, default=0), config.rounds
