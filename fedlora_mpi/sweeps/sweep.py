"""``fedlora-mpi sweep`` and ``fedlora_mpi.sweep``."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.runs import Runs
from ..config.blocks import ConfigError
from ..core.escapes import escape_line
from ..experiment.loop import STOPPED_EXIT
from ..experiment.processes import plan_slots
from . import grid
from .axes import Interval, split_overrides
from .carry_out import GO_ON, Grid, carry_out, first_state
from .grid import Job, WrongJobs
from .view import make_view


@dataclass(frozen=True)
class Request:
    """The command line. jobs: runs at a time; None: as many as the machine has room for."""

    config: str
    overrides: Sequence[str]
    jobs: int | None = None
    ranks: int = 1
    print_jobs: bool = False

    def __post_init__(self) -> None:
        for name in ("jobs", "ranks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} = {value}: must be an integer of at least 1")


class SweepError(RuntimeError):
    """A sweep that is not done: a line for each run that has failed, or how to go on."""


def sweep(config: str | Path, *axes: str, jobs: int = 1, ranks: int = 1) -> Runs:
    """Train the runs of a sweep that are not done, and return all its runs.

    axes: as on the command line, for instance ``"train.lr=0.01,0.1", "seed=range(1,4)"``, with
    other overrides among them. jobs: runs at a time; ranks: MPI processes of a run. Raises
    ValueError for a mistake, with a line for each wrong combination, before any run starts; raises
    SweepError if a run fails or is stopped.

    >>> import fedlora_mpi
    >>> runs = fedlora_mpi.sweep("tiny.yaml", "algorithm=fedavg,local", "rounds=1")
    >>> sorted(runs.settings["algorithm"])
    ['fedavg', 'local']
    """
    request = Request(str(config), axes, jobs, ranks)
    folder, all_jobs = plan_grid(request)
    code, lines = run_grid(request, folder, all_jobs)
    if code:
        raise SweepError("; ".join(lines))
    return Runs([job.folder for job in all_jobs])


def execute(request: Request) -> int:
    """Carry out a sweep for the command line, and return the exit code."""
    try:
        folder, jobs = plan_grid(request)
    except WrongJobs as wrong:
        for line in wrong.lines:
            print(f"fedlora-mpi: {escape_line(line)}", file=sys.stderr)
        return 2
    if request.print_jobs:
        print("\n".join(job.shell_line(request.ranks) for job in jobs if not job.is_done))
        return 0
    code, lines = run_grid(request, folder, jobs)
    for line in lines:
        print(f"fedlora-mpi: {escape_line(line)}", file=sys.stderr, flush=True)
    return code


def plan_grid(request: Request) -> tuple[Path, list[Job]]:
    """Return the folder of a sweep and its runs, all checked. Raises ValueError, WrongJobs."""
    plain, axes = split_overrides(request.overrides)
    if not axes:
        raise ConfigError(
            f"{request.config}: a sweep needs a key with several values, such as train.lr=0.01,0.1"
        )
    for axis in axes:
        if isinstance(axis, Interval):
            raise ConfigError(f"{axis.key}: interval is for a search; add --sampler tpe --trials N")
    all_values = list(grid.combinations(axes))
    jobs = grid.make_jobs(request.config, plain, all_values)
    return _folder_of(request.config, plain, all_values[0]), jobs


def _folder_of(config: str, plain: Sequence[str], values: Mapping[str, Any]) -> Path:
    overrides = [*plain, *(f"{key}={value}" for key, value in values.items())]
    return grid.sweep_place(config, overrides).folder


def run_grid(request: Request, folder: Path, jobs: Sequence[Job]) -> tuple[int, list[str]]:
    """Carry out the runs that are not done. Return the exit code and what went wrong, in lines."""
    grid.describe(folder, request.config, jobs)
    threads = max(job.config.engine.threads for job in jobs)
    slots = plan_slots(request.jobs, request.ranks, threads)
    states = {job.name: first_state(job) for job in jobs}
    view = make_view(str(folder), states, len(jobs))
    print(
        escape_line(f"{folder}: {len(jobs)} runs, {view.counts()}, {slots.count} at a time"),
        file=sys.stderr,
        flush=True,
    )
    failures = carry_out(Grid(jobs), slots, request.ranks, view)
    print(escape_line(f"{folder}: {view.counts()}"), flush=True)
    lines = [f"{name}: {reason}" for name, reason in failures.items()]
    if failures:
        return 1, lines
    if {*view.states.values()} != {"done"}:
        return STOPPED_EXIT, [f"{folder}: not done; {GO_ON}"]
    return 0, []
