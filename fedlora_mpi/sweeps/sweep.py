"""``fedlora-mpi sweep`` and ``fedlora_mpi.sweep``."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..analysis.runs import Runs
from ..config import COMMAND_LINE, ConfigError
from ..core.escapes import escape_line
from ..experiment.loop import STOPPED_EXIT
from ..experiment.processes import plan_slots
from ..experiment.slurm import submit_array
from ..store.lock import hold_lock
from ..store.sweep_folder import expand_sweeps, is_sweep, read_description
from . import grid
from .axes import Axis, Interval, single_value_hint, split_overrides
from .carry_out import GO_ON, Grid, Source, carry_out, first_state
from .grid import Job, WrongJobs
from .metric import check_metric
from .search import Search, SearchSettings, corner_values, split_space
from .view import View, make_view

_MAX_RUNS = 10_000


@dataclass(frozen=True)
class Request:
    """The command line.

    jobs: runs at a time; None: as many as the machine has room for. search: the options of a
    search, and slurm_options those for Slurm, that were given.
    """

    config: str
    overrides: Sequence[str]
    jobs: int | None = None
    ranks: int = 1
    print_jobs: bool = False
    search: Mapping[str, Any] = field(default_factory=dict)
    slurm: bool = False
    slurm_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("jobs", "ranks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} = {value}: must be an integer of at least 1")
        if self.slurm_options and not self.slurm:
            name = next(iter(self.slurm_options)).replace("_", "-")
            raise ValueError(f"--{name}: is for Slurm; add --slurm")
        if self.search and "sampler" not in self.search:
            raise ValueError(f"--{next(iter(self.search))}: is for a search; add --sampler tpe")
        if self.search and "trials" not in self.search:
            raise ValueError("--sampler: needs the number of trials; add --trials N")
        if self.search and (self.slurm or self.print_jobs):
            raise ValueError(
                "--sampler: a search chooses each run by those before it; start it without "
                f"--{'slurm' if self.slurm else 'print-jobs'}, within a job of its own"
            )


class SweepError(RuntimeError):
    """A sweep that is not done: what has failed, or how to go on."""


def sweep(
    config: str | Path, *axes: str, jobs: int = 1, ranks: int = 1, **search: str | int
) -> Runs:
    """Train the runs of a sweep that are not done, and return all its runs.

    axes: as on the command line, for instance ``"train.lr=0.01,0.1", "seed=range(1,4)"``, with
    other overrides among them. config: a YAML file, no dict and no text, for each run is a process
    that reads it. jobs: runs at a time; ranks: MPI processes of a run; search:
    ``sampler``, ``trials``, ``metric``, ``direction`` and ``pruner``. Raises ValueError for a
    mistake, with a line for each wrong combination, before any run starts; raises SweepError if a
    run fails or is stopped.

    >>> import fedlora_mpi
    >>> runs = fedlora_mpi.sweep("tiny.yaml", "algorithm=fedavg,local", "rounds=1")
    >>> sorted(runs.settings["algorithm"])
    ['fedavg', 'local']
    """
    if not isinstance(config, str | Path) or "\n" in str(config):
        raise ValueError(
            "config: a sweep needs the name of a YAML file, which each of its runs reads; write "
            "the dict or the text into a file"
        )
    options = [option.name for option in fields(SearchSettings)]
    for name in search:
        if name not in options:
            raise ValueError(
                f"{name}: sweep has no such argument; give settings as texts, such as "
                f'"train.lr=0.01,0.1"; the arguments of a search are {", ".join(options)}'
            )
    request = Request(str(config), axes, jobs, ranks, search=search)
    if search:
        code, lines, folder = run_search(request)
        paths = expand_sweeps([folder])
    else:
        folder, all_jobs = plan_grid(request)
        code, lines = run_grid(request, folder, all_jobs)
        paths = [job.folder for job in all_jobs]
    if code:
        raise SweepError("; ".join(lines))
    return Runs(paths)


def execute(request: Request) -> int:
    """Carry out a sweep for the command line, and return the exit code."""
    try:
        if request.search:
            code, lines, _ = run_search(request)
        else:
            folder, jobs = plan_grid(request)
            if request.print_jobs:
                print("\n".join(job.shell_line(request.ranks) for job in jobs if not job.is_done))
                return 0
            if request.slurm:
                print(queue_grid(request, folder, jobs))
                return 0
            code, lines = run_grid(request, folder, jobs)
    except WrongJobs as wrong:
        code, lines = 2, list(wrong.lines)
    for line in lines:
        print(f"fedlora-mpi: {escape_line(line)}", file=sys.stderr, flush=True)
    return code


def plan_grid(request: Request) -> tuple[Path, list[Job]]:
    """Return the folder of a sweep and its runs, all checked. Raises ValueError, WrongJobs."""
    plain, axes = _split_request(request)
    values_axes = [axis for axis in axes if isinstance(axis, Axis)]
    for axis in axes:
        if isinstance(axis, Interval):
            raise ConfigError(f"{axis.key}: interval is for a search; add --sampler tpe --trials N")
    number = math.prod(len(axis.values) for axis in values_axes)
    if number > _MAX_RUNS:
        raise ConfigError(f"{request.config}: {number} runs; a sweep has at most {_MAX_RUNS}")
    all_values = list(grid.combinations(values_axes))
    place = grid.sweep_place(request.config, plain)
    if is_sweep(place.folder):
        read_description(place.folder)
    return place.folder, grid.make_jobs(request.config, plain, all_values, place)


def queue_grid(request: Request, folder: Path, jobs: Sequence[Job]) -> str:
    """Queue the runs that are left as a Slurm array. Return a message, or the script."""
    left = [job for job in jobs if not (job.is_done or job.is_elsewhere)]
    if not left:
        return escape_line(f"{folder}: no run is left to queue")
    options = {"dry_run": False} | dict(request.slurm_options)
    message = submit_array(
        max((job.config for job in left), key=lambda config: config.engine.threads),
        request.config,
        [job.arguments for job in left],
        folder,
        ranks=request.ranks,
        array_limit=request.jobs or 0,
        **options,
    )
    if not options["dry_run"]:
        grid.describe(folder, request.config, jobs)
    return message


def run_grid(request: Request, folder: Path, jobs: Sequence[Job]) -> tuple[int, list[str]]:
    """Carry out the runs that are not done. Return the exit code and what went wrong, in lines."""
    grid.describe(folder, request.config, jobs)
    if longer := [job for job in jobs if job.rounds_done > job.config.rounds]:
        hint = (
            f"hint: rounds = {longer[0].config.rounds}: {longer[0].folder} has "
            f"{longer[0].rounds_done} rounds; it stays as it is"
        )
        others = f", as {len(longer) - 1} more" if len(longer) > 1 else ""
        print(escape_line(f"{hint}{others}"), file=sys.stderr, flush=True)
    states = {job.name: first_state(job) for job in jobs}
    view = make_view(str(folder), states, lambda: len(jobs))
    lines = _carry_out(request, folder, Grid(jobs), view, jobs)
    if lines:
        return 1, lines
    if {*view.states.values()} != {"done"}:
        return STOPPED_EXIT, [f"{folder}: not done; {GO_ON}"]
    return 0, []


def run_search(request: Request) -> tuple[int, list[str], Path]:
    """Carry out the trials that are left.

    Return the exit code, what went wrong in lines, and the folder. Raises ValueError, WrongJobs.
    """
    settings = SearchSettings(**request.search)
    plain, axes = _split_request(request)
    space = split_space(axes)
    place = grid.sweep_place(request.config, plain)
    checked_jobs = grid.make_jobs(request.config, plain, list(corner_values(space)), place)
    check_metric(settings.metric, checked_jobs)
    place.folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(place.folder):
        search = Search(settings, space, request.config, plain, place)
        view = make_view(str(place.folder), search.earlier_states, lambda: search.num_runs)
        lines = _carry_out(request, place.folder, search, view, checked_jobs)
    if best := search.best_line():
        print(escape_line(f"{place.folder}: {best}"), flush=True)
    lines += [f"{name}: no trial: {reason}" for name, reason in search.refusals.items()]
    if lines:
        return 1, lines, place.folder
    if not search.is_done:
        return STOPPED_EXIT, [f"{place.folder}: not done; {GO_ON}"], place.folder
    return 0, [], place.folder


def _split_request(request: Request) -> tuple[list[str], list[Axis | Interval]]:
    """Return the overrides with one value, and the axes. Raises ConfigError without any axis."""
    plain, axes = split_overrides(request.overrides)
    if not axes:
        hints = [f"{text}: {hint}" for text in plain if (hint := single_value_hint(text))]
        raise ConfigError(
            f"{COMMAND_LINE}: {hints[0]}"
            if hints
            else f"{request.config}: a sweep needs a key with several values, such as "
            f"train.lr=0.01,0.1; {', '.join(plain) or 'the command line'} has none"
        )
    return plain, axes


def _carry_out(
    request: Request, folder: Path, source: Source, view: View, jobs: Sequence[Job]
) -> list[str]:
    """Carry out runs between a line on stderr and one on stdout. Return a line for each failure."""
    threads = max(job.config.engine.threads for job in jobs)
    slots = plan_slots(request.jobs, request.ranks, threads)
    line = f"{folder}: {view.counts()}, {slots.number} at a time"
    print(escape_line(line), file=sys.stderr, flush=True)
    failures = carry_out(source, slots, request.ranks, view)
    print(escape_line(f"{folder}: {view.counts()}"), flush=True)
    return [f"{name}: {reason}" for name, reason in failures.items()]
