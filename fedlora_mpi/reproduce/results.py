"""The results of finished runs, and which runs of a grid are finished."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import Config, all_settings, digest, from_recorded
from ..engine.settings import Engine
from ..store.files import StoreError
from ..store.reader import RunFiles
from .grid import Job, Score

LATE_ROUNDS = 5


@dataclass(frozen=True)
class Result:
    """A finished run, up to the requested round."""

    job: Job
    rounds: Mapping[str, np.ndarray]  # columns [T]
    clients: Mapping[str, np.ndarray]  # columns [T, N]
    folder: Path | None = None  # the run folder

    @property
    def best_row(self) -> int:
        """The row of the best round, which has the highest mean of the clients' own accuracies."""
        return int(np.nanargmax(self.rounds["accuracy"]))

    @property
    def best(self) -> float:
        """The paper's metric: the accuracy in the best round, per cent."""
        return 100 * float(self.rounds["accuracy"][self.best_row])

    @property
    def last(self) -> float:
        """The accuracy after the last round, per cent."""
        return 100 * float(self.rounds["accuracy"][-1])

    @property
    def has_diverged(self) -> bool:
        """Whether a client was left out because its numbers were not finite. Its scores
        are then those of a model that no longer learns.
        """
        return bool(np.any(self.rounds.get("skipped", 0)))

    def late(self, score: Score) -> float:
        """The mean of a score after each of the last ``LATE_ROUNDS`` rounds."""
        return score.factor * float(self.rounds[score.column][-LATE_ROUNDS:].mean())


class ResultStore:
    """The run folders under ``out``. A run that one table has finished also serves the others.

    Two runs are the same if their configs differ at most in keys that a resume may change and in
    the ``engine`` block.
    """

    def __init__(self, out: Path) -> None:
        self._folders_of: dict[str, list[tuple[int, Path]]] = {}
        for folder in sorted(path.parent for path in out.glob("*/*/*/log.h5")):
            if (config := _read_config(folder)) is not None:
                self._folders_of.setdefault(_settings_digest(config), []).append(
                    (num_logged_rounds(folder), folder)
                )

    def find_finished(self, job: Job) -> Path | None:
        """The folder that holds all rounds of this run: its own, or that of an equal run. None if
        there is none.
        """
        folders = [
            folder
            for num_rounds, folder in self._folders_of.get(_settings_digest(job.config), [])
            if num_rounds >= job.config.rounds
        ]
        return job.folder if job.folder in folders else next(iter(folders), None)

    def result(self, job: Job) -> Result | None:
        """The columns of a finished run. None if it is not finished."""
        if (folder := self.find_finished(job)) is None:
            return None
        files = RunFiles(folder)
        rounds, clients = files.rounds(), files.clients()
        wanted = slice(np.searchsorted(rounds["round"], job.config.rounds, side="right"))

        def cut_columns(columns):
            return {name: column[wanted] for name, column in columns.items()}

        return Result(job, cut_columns(rounds), cut_columns(clients), folder)


def num_logged_rounds(folder: Path) -> int:
    """How many rounds the log of a run folder has. 0 if there is no readable log."""
    try:
        return len(RunFiles(folder).rounds()["round"])
    except StoreError:
        return 0


def check_folder(job: Job) -> None:
    """Raise ValueError if the run's folder holds a run with other settings."""
    recorded = _read_config(job.folder)
    if recorded is None or _settings_digest(recorded) == _settings_digest(job.config):
        return
    recorded_keys, job_keys = (all_settings(config) for config in (recorded, job.config))
    ignored = ("output", "rounds", "engine.", "checkpoint.", "data.root", "data.download")
    changes = [
        f"{key} = {recorded_keys.get(key)} (now {job_keys.get(key)})"
        for key in {**recorded_keys, **job_keys}
        if recorded_keys.get(key) != job_keys.get(key) and not key.startswith(ignored)
    ]
    raise ValueError(
        f"{job.folder}: holds a run with {', '.join(changes)}; choose another folder with -o"
    )


def _read_config(folder: Path) -> Config | None:
    """The config of a run folder. None if there is none that this version can read."""
    try:
        return from_recorded(RunFiles(folder).config, str(folder))
    except ValueError:
        return None


def _settings_digest(config: Config) -> str:
    """A digest that is equal for two runs whose results should be equal except for rounding."""
    return digest(replace(config, engine=Engine()))
