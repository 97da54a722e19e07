"""The runs of a sweep: one for each combination of values, checked before the first one starts."""

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .. import config as configs
from ..analysis.groups import short_key
from ..analysis.status import run_progress
from ..config import Config, ConfigError
from ..core.escapes import safe_file_name
from ..core.paths import expand_home
from ..experiment.parts import check_loss
from ..experiment.processes import Task
from ..mpi import launch
from ..store import sweep_folder
from ..store.files import text_checksum
from ..store.lock import is_held
from .axes import Axis

_MAX_NAME = 200  # characters of the name of a run folder
_SHOWN_WRONG = 20  # wrong combinations that are told


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    values: {key: value} of what varies, as texts of overrides. overrides: all that the run is
    started with. is_done, is_elsewhere: whether all its rounds are done, or another process trains
    it, when the sweep began; rounds_done: how many were done then.
    """

    values: Mapping[str, str]
    config_file: str
    overrides: tuple[str, ...]
    config: Config
    is_done: bool
    is_elsewhere: bool
    rounds_done: int

    @property
    def name(self) -> str:
        """What varies, in words."""
        return job_name(self.values)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return expand_home(self.config.output)

    def has_all_rounds(self) -> bool:
        """Return whether the run folder has a checkpoint of the last round now."""
        if not (self.folder / "config.yaml").is_file():
            return False
        return run_progress(self.folder, ())[1] >= self.config.rounds

    @property
    def log(self) -> Path:
        """The file of what the run prints, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``fedlora-mpi run --resume``."""
        return [self.config_file, *self.overrides]

    def task(self, ranks: int) -> Task:
        """Return the process that starts the run, or goes on with it."""
        return Task(self.name, [*launch.launch_command(1), *self._run_arguments(ranks)], self.log)

    def shell_line(self, ranks: int) -> str:
        """Return the command of the run for a shell."""
        return shlex.join(["fedlora-mpi", *self._run_arguments(ranks)])

    def _run_arguments(self, ranks: int) -> list[str]:
        ranks_option = ["--ranks", str(ranks)] if ranks > 1 else []
        return ["run", "--resume", *ranks_option, *self.arguments]


class WrongJobs(ValueError):
    """Combinations that are refused, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Place(NamedTuple):
    """Where the runs of a sweep lie.

    folder: of the sweep. names_runs: whether ``output`` of the overrides names each run's folder;
    else the sweep names it by what varies.
    """

    folder: Path
    names_runs: bool


def sweep_place(config_file: str, overrides: Sequence[str]) -> Place:
    """Return where the runs of a sweep lie. overrides: those that all runs have.

    ``output=FOLDER`` is the sweep's folder. Of an ``output`` with placeholders it is the part
    before them. Without ``output`` it is CONFIG-sweep beside where a single run would lie. Raises
    ConfigError if it is a run folder or in one.
    """
    pattern = configs.output_pattern(config_file, overrides)
    is_given = any(text.startswith("output=") for text in overrides)
    parts = expand_home(pattern).parts
    fixed = Path(*itertools.takewhile(lambda part: not configs.has_placeholder(part), parts[:-1]))
    if is_given and configs.has_placeholder(pattern):
        place = Place(fixed, names_runs=True)
    else:
        folder = expand_home(pattern) if is_given else fixed / f"{Path(config_file).stem}-sweep"
        place = Place(folder, names_runs=False)
    for folder in (place.folder, *place.folder.parents):
        if (folder / "log.h5").is_file():
            raise ConfigError(
                f"output = {pattern}: {folder} is a run folder; choose a folder outside of it"
            )
    return place


def combinations(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Yield {key: value} of each combination; the last axis varies fastest."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def make_jobs(
    config_file: str,
    plain: Sequence[str],
    all_values: Sequence[Mapping[str, str]],
    place: Place,
) -> list[Job]:
    """Return the run of each combination.

    plain: the overrides that all runs have. Raises WrongJobs.
    """
    jobs: list[Job] = []
    wrong: dict[str, list[str]] = {}
    of_folder: dict[Path, str] = {}
    for values in all_values:
        try:
            job = make_job(config_file, plain, values, place)
            if (other := of_folder.setdefault(job.folder, job.name)) != job.name:
                raise ValueError(
                    f"output = {job.folder}: is also that of {other}; put what differs into "
                    f"output, such as {{{next(iter(values))}}}"
                )
            jobs.append(job)
        except ValueError as error:
            wrong.setdefault(str(error), []).append(job_name(values))
    if wrong:
        raise WrongJobs(list(_wrong_lines(wrong)))
    return jobs


def make_job(
    config_file: str, plain: Sequence[str], values: Mapping[str, str], place: Place
) -> Job:
    """Return the run of one combination. Raises ValueError."""
    linked = (_fill_values(text, values) for text in plain)
    overrides = (*linked, *(f"{key}={value}" for key, value in values.items()))
    if not place.names_runs:
        others = (text for text in overrides if not text.startswith("output="))
        overrides = (*others, f"output={place.folder / folder_name(values)}")
    config = configs.read(config_file, overrides)
    check_loss(config, config_file)
    folder = expand_home(config.output)
    rounds_done, is_elsewhere = 0, False
    if (folder / "config.yaml").is_file():
        rounds_done = run_progress(Path(config_file), overrides)[1]
        is_elsewhere = bool(is_held(folder))
    elif os.path.lexists(folder):
        raise ValueError(f"output = {folder}: is no run folder; choose another output")
    is_done = rounds_done >= config.rounds
    return Job(
        values, config_file, overrides, config, is_done, is_elsewhere and not is_done, rounds_done
    )


def _fill_values(text: str, values: Mapping[str, str]) -> str:
    """Return an override with the value of an axis in the place of its {key}."""
    if text.startswith("output="):  # the config fills it
        return text
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def job_name(values: Mapping[str, str]) -> str:
    """Return what varies in words: ``algorithm=fedlora, lr=0.1``."""
    return ", ".join(f"{short_key(key, [*values])}={value}" for key, value in values.items())


def folder_name(values: Mapping[str, str]) -> str:
    """Return the name of the folder of a run: ``algorithm=fedlora,lr=0.1``.

    A value that no folder can be named by is replaced by what is left of it and a checksum.
    """
    parts = []
    for key, value in values.items():
        word = safe_file_name(value)
        is_changed = word != value or value.startswith(".")
        parts.append(
            f"{short_key(key, [*values])}={word}"
            + (f"-{text_checksum(value)[:6]}" if is_changed else "")
        )
    name = ",".join(parts)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{text_checksum(name)[:6]}"


def describe(folder: Path, config_file: str, jobs: Sequence[Job]) -> None:
    """Write the description of the sweep, by which ``report`` finds its runs."""
    runs = {os.path.relpath(job.folder, folder): job.values for job in jobs}
    sweep_folder.add_runs(folder, config_file, runs)


def _wrong_lines(wrong: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for reason, names in itertools.islice(wrong.items(), _SHOWN_WRONG):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{others}: {reason}"
    if len(wrong) > _SHOWN_WRONG:
        yield f"{len(wrong) - _SHOWN_WRONG} more combinations are wrong"
