"""A search with Optuna: each trial is a run, or a run for each seed, and its value a metric.

The study is a journal in the sweep's folder, so the same command goes on with it. A trial that was
running when the search was stopped is asked for again with the same values; its run folder has the
same name, so it goes on where it was.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..analysis.groups import SEED_KEYS
from ..core.extras import extra_imports
from ..store.files import StoreError
from ..store.reader import RunFiles
from ..store.sweep_folder import STUDY_FILE
from . import grid
from .axes import Axis, Interval
from .carry_out import end_state
from .grid import Job
from .metric import metric_direction

if TYPE_CHECKING:
    import optuna

SAMPLERS, PRUNERS, DIRECTIONS = ("tpe", "random"), ("median", "none"), ("maximize", "minimize")
_READ_SECONDS = 1.0  # from one look into the log of a run to the next


@dataclass(frozen=True)
class SearchSettings:
    """What the command line says of a search. direction: "" follows from the metric's name."""

    sampler: str
    trials: int
    metric: str = "accuracy"
    direction: str = ""
    pruner: str = "median"

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"--trials = {self.trials}: must be an integer of at least 1")
        if not self.direction:
            object.__setattr__(self, "direction", metric_direction(self.metric))


class Space(NamedTuple):
    """What a search varies. seeds: the values of the seeds, with all of which a trial is run."""

    axes: tuple[Axis | Interval, ...]
    seeds: tuple[dict[str, str], ...]


def split_space(axes: Sequence[Axis | Interval]) -> Space:
    """Return the axes of a search; a seed is repeated, not searched. Raises ValueError."""
    seed_axes = [axis for axis in axes if axis.key in SEED_KEYS]
    searched = tuple(axis for axis in axes if axis.key not in SEED_KEYS)
    for axis in seed_axes:
        if isinstance(axis, Interval):
            raise ValueError(f"{axis.key}: a seed is not searched; give its values, such as 1,2,3")
    if not searched:
        raise ValueError("a search needs a key beside the seeds, such as train.lr=interval(0.01,1)")
    values_axes = [axis for axis in seed_axes if isinstance(axis, Axis)]
    return Space(searched, tuple(grid.combinations(values_axes)))


def corner_values(space: Space) -> Iterator[dict[str, str]]:
    """Yield values to check before the first trial: each end and choice of each axis in turn."""
    texts_of = {axis.key: _end_texts(axis) for axis in space.axes}
    first = {key: texts[0] for key, texts in texts_of.items()}
    yield first | space.seeds[0]
    for key, texts in texts_of.items():
        for text in texts[1:]:
            yield first | {key: text} | space.seeds[0]


@dataclass
class _Trial:
    """A trial of the study. left: its runs that have not begun. twins: trials with its values.

    outcome: how it ended; "" while it goes on.
    """

    trial: "optuna.Trial"
    left: deque[Job]
    twins: list["optuna.Trial"] = field(default_factory=list)
    outcome: str = ""
    values: list[float] = field(default_factory=list)  # of its finished runs
    reported_round: int = 0
    is_pruned: bool = False


class Search:
    """The runs of a search, see ``carry_out.Source``."""

    def __init__(
        self,
        settings: SearchSettings,
        space: Space,
        config_file: str,
        plain: Sequence[str],
        place: grid.Place,
    ) -> None:
        """Open the study, or begin it. Raises ValueError without Optuna."""
        self._settings, self._space = settings, space
        self._config_file, self._plain, self._place = config_file, plain, place
        base_seed = grid.make_job(config_file, plain, next(corner_values(space)), place).config.seed
        self.study = open_study(settings, place.folder, base_seed)
        self.earlier_states = dict(self._states_of_finished())
        self.refusals: dict[str, str] = {}  # {what a trial would have been: why it is none}
        self._left = max(0, settings.trials - len(self._finished_trials()))
        self._waiting: deque[Job] = deque()
        self._trials: dict[str, _Trial] = {}  # by the name of a run
        self._read_at: dict[str, float] = {}  # by the name of a run, of time.monotonic
        self.jobs: list[Job] = []  # that this call has started

    @property
    def num_runs(self) -> int:
        """How many runs there are at most, with those that earlier calls have ended."""
        left = sum(len(trial.left) for trial in self._trials.values() if not trial.outcome)
        left = left // len(self._space.seeds) + len(self._waiting)
        left += self._left * len(self._space.seeds)
        return len({*self.earlier_states, *(job.name for job in self.jobs)}) + left

    @property
    def is_done(self) -> bool:
        """Whether there are as many finished trials as were asked for."""
        return len(self._finished_trials()) >= self._settings.trials

    def next_job(self) -> Job | None:
        """Return the next run: another seed of a trial, else the first of a new trial."""
        while not self._waiting:
            if not self._left:
                return None
            self._left -= 1
            self._begin_trial()
        job = self._waiting.popleft()
        self.jobs.append(job)
        return job

    def end(self, job: Job, code: int) -> str:
        """Note the end of a run in the study, and return its state."""
        trial, state = self._trials[job.name], end_state(code)
        if state == "stopped" and trial.is_pruned:
            self._tell(trial, "PRUNED")
            return "pruned"
        if state == "failed":
            self._tell(trial, "FAIL")
        elif state == "done":
            self._add_value(trial, job)
        return state

    def jobs_to_stop(self, running: Iterable[Job]) -> Sequence[Job]:
        """Report new rounds to the study, and return the runs that its pruner gives up.

        Of a trial with several seeds the first decides.
        """
        return [job for job in running if self._is_due(job) and self._is_given_up(job)]

    def best_line(self) -> str:
        """Return the best trial in words; "" before any is complete."""
        try:
            best = self.study.best_trial
        except ValueError:
            return ""
        values = self._value_texts(best.params)
        metric, value = self._settings.metric, best.value
        return f"best {metric} {value:.6g} of trial {best.number + 1}: {grid.job_name(values)}"

    def _begin_trial(self) -> None:
        """Ask the study for a trial and queue its runs that are not done."""
        trial = self.study.ask()
        values = {axis.key: _value_text(axis, _suggest(trial, axis)) for axis in self._space.axes}
        runs = [values | seeds for seeds in self._space.seeds]
        try:
            jobs = grid.make_jobs(self._config_file, self._plain, runs, self._place)
        except grid.WrongJobs as wrong:
            self.refusals[grid.job_name(values)] = wrong.lines[0]
            self._tell(_Trial(trial, deque()), "FAIL")
            return
        if twin := self._trials.get(jobs[0].name):
            twin.twins.append(trial)
            if twin.outcome:
                self._tell(twin, twin.outcome)
            return
        grid.describe(self._place.folder, self._config_file, jobs)
        running = _Trial(trial, deque(jobs))
        self._trials |= {job.name: running for job in jobs}
        self._queue_next(running)

    def _queue_next(self, trial: _Trial) -> None:
        """Queue the next run of a trial; tell the study its value after the last."""
        while trial.left and trial.left[0].is_done:
            trial.values.append(self._final_value(trial.left.popleft()))
        if trial.left:
            self._waiting.append(trial.left.popleft())
            return
        is_known = bool(np.isfinite(trial.values).all())
        self._tell(trial, "COMPLETE" if is_known else "FAIL")

    def _add_value(self, trial: _Trial, job: Job) -> None:
        trial.values.append(self._final_value(job))
        self._queue_next(trial)

    def _tell(self, trial: _Trial, outcome: str) -> None:
        """Tell the study how a trial and its twins have ended."""
        from optuna.trial import TrialState

        trial.outcome = outcome
        value = float(np.mean(trial.values)) if outcome == "COMPLETE" else None
        for one in (trial.trial, *trial.twins):
            self.study.tell(one, value, TrialState[outcome], skip_if_finished=True)

    def _states_of_finished(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the state of each run of the trials that earlier calls have ended."""
        for trial in self._finished_trials():
            values = self._value_texts(trial.params)
            for seeds in self._space.seeds:
                state = "pruned" if trial.state.name == "PRUNED" else "done"
                yield grid.job_name(values | seeds), state

    def _value_texts(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Return {key: text of an override} of what the study knows of a trial."""
        return {axis.key: _value_text(axis, params[axis.key]) for axis in self._space.axes}

    def _finished_trials(self) -> list["optuna.trial.FrozenTrial"]:
        from optuna.trial import TrialState

        return self.study.get_trials(False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _is_due(self, job: Job) -> bool:
        """Whether it is time to look into the log of a run again."""
        if time.monotonic() - self._read_at.get(job.name, -np.inf) < _READ_SECONDS:
            return False
        self._read_at[job.name] = time.monotonic()
        return not self._trials[job.name].values

    def _is_given_up(self, job: Job) -> bool:
        """Report the evaluated rounds of a run, and return whether the pruner stops it."""
        trial = self._trials[job.name]
        try:
            rounds, values = self._metric_rounds(job)
        except (StoreError, OSError):  # its log is not there yet, or being replaced
            return False
        for round_, value in zip(rounds, values, strict=True):
            if round_ > trial.reported_round:
                trial.reported_round = int(round_)
                trial.trial.report(float(value), int(round_))
                trial.is_pruned |= round_ < job.config.rounds and trial.trial.should_prune()
        return trial.is_pruned

    def _final_value(self, job: Job) -> float:
        values = self._metric_rounds(job)[1]
        return float(values[-1]) if len(values) else np.nan

    def _metric_rounds(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """Return the rounds that have the metric, and its values. Raises MissingMetric."""
        columns = RunFiles(job.folder).rounds()
        metric = self._settings.metric
        if metric not in columns:
            if not len(columns["round"]):
                return np.zeros(0), np.zeros(0)
            names = ", ".join(name for name in columns if name != "round")
            raise MissingMetric(f"--metric = {metric}: the log has no such column; it has {names}")
        is_known = np.isfinite(columns[metric])
        is_evaluated = np.isfinite(columns.get("loss", columns[metric]))
        if metric.startswith("accuracy") and is_evaluated.any() and not is_known.any():
            raise MissingMetric(
                f"--metric = {metric}: is NaN in {job.folder}, whose targets are no classes; "
                "choose --metric loss"
            )
        return columns["round"][is_known], columns[metric][is_known]


class MissingMetric(ValueError):
    """The log of a run has no such column, or only NaN in it."""


def open_study(settings: SearchSettings, folder: Path, base_seed: int) -> "optuna.Study":
    """Return the study of a sweep. Trials that were cut short are asked for again.

    base_seed: the sampler draws from it and the number of trials, so that a search that goes on
    does not draw the same numbers again. Raises ValueError.
    """
    with extra_imports("optuna", "tune", "a search", "leave out --sampler"):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STUDY_FILE
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file))),
        study_name="sweep",
        load_if_exists=True,
        direction=optuna.study.StudyDirection[settings.direction.upper()],
        pruner=optuna.pruners.MedianPruner()
        if settings.pruner == "median"
        else optuna.pruners.NopPruner(),
    )
    metric = study.user_attrs.get("metric", settings.metric)
    if (metric, study.direction.name.lower()) != (settings.metric, settings.direction):
        raise ValueError(
            f"{file}: is a search to {study.direction.name.lower()} {metric}; choose another "
            "folder with output=FOLDER"
        )
    study.set_user_attr("metric", settings.metric)
    for trial in study.get_trials(False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    sampler_seed = base_seed + len(study.trials)
    study.sampler = (
        optuna.samplers.TPESampler(seed=sampler_seed)
        if settings.sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=sampler_seed)
    )
    return study


def _suggest(trial: "optuna.Trial", axis: Axis | Interval) -> int | float | str:
    """Return a value of an axis as the sampler draws it."""
    key = axis.key
    if isinstance(axis, Interval):
        if isinstance(axis.low, int) and isinstance(axis.high, int):
            return trial.suggest_int(key, axis.low, axis.high, log=axis.is_log)
        return trial.suggest_float(key, axis.low, axis.high, log=axis.is_log)
    if axis.is_range and len(axis.values) > 1:  # the index, which steps by 1 whatever the numbers
        return trial.suggest_int(key, 0, len(axis.values) - 1)
    return str(trial.suggest_categorical(key, list(axis.values)))


def _value_text(axis: Axis | Interval, value: int | float | str) -> str:
    """Return a drawn value as the text of an override; a float has six digits."""
    if isinstance(axis, Axis) and isinstance(value, int):
        return axis.values[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _end_texts(axis: Axis | Interval) -> list[str]:
    if isinstance(axis, Axis):
        return list(axis.values)
    return [_value_text(axis, axis.low), _value_text(axis, axis.high)]
