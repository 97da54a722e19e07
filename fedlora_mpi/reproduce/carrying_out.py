"""``fedlora-mpi reproduce``: write the configs of a table, execute the missing runs, compare."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..config import resolved_yaml
from ..core.losses import find_loss
from ..data.datasets import load
from ..experiment.loop import STOPPED_EXIT
from ..experiment.processes import last_line, plan_slots
from ..store import nolinks
from ..store.files import write_atomic
from . import carry, sheet
from .grid import Case, Job, Tuning, make_job
from .pfedlora_table import TABLE_NAME
from .registry import TABLES, table_entries
from .request import Request
from .results import ResultStore, check_folder, num_logged_rounds
from .showing import collect_results, publish_case, publish_overview
from .tuning import Rates, choose_rates, trial_entries

JobGrid = list[tuple[Case, list[Job]]]  # the runs of each case


def reproduce(request: Request) -> int:
    """Execute the missing runs of a table and print the table. Returns the exit code, 1 if a run
    failed.
    """
    tuning = TABLES[request.table].tuning
    if tuning is None:
        return reproduce_grid(request, _make_grid(request))
    trials = [job for _, jobs in _make_grid(request, tuning=tuning) for job in jobs]
    missing = _find_missing(request, trials)
    if missing and request.print_jobs:
        print("\n".join(_slurm_lines(request, missing, "asks for the runs of the table")))
        return 0
    failed = {} if request.collect else _run_missing(request, trials, missing)
    rates = choose_rates(trials, ResultStore(request.root_folder), tuning.score)
    return max(_report_failed(trials, failed), reproduce_grid(request, _make_grid(request, rates)))


def reproduce_grid(request: Request, grid: JobGrid) -> int:
    """``reproduce`` for any grid of runs."""
    jobs = [run for _, runs in grid for run in runs]
    missing = _find_missing(request, jobs)
    if request.print_jobs:
        print("\n".join(_slurm_lines(request, missing, "without --print-jobs prints the table")))
        return 0
    failed = {} if request.collect else _run_missing(request, jobs, missing)
    store = ResultStore(request.root_folder)
    results_of = {case: collect_results(runs, store) for case, runs in grid}
    for case, results in results_of.items():
        publish_case(request, case, results)
    if request.table == TABLE_NAME and len(results_of) > 1:
        publish_overview(request, results_of)
    return _report_failed(jobs, failed)


def _find_missing(request: Request, jobs: Sequence[Job]) -> list[Job]:
    """The runs that are not finished."""
    store = ResultStore(request.root_folder)
    return [job for job in jobs if not store.find_finished(job)]


def _report_failed(jobs: Sequence[Job], failed: Mapping[str, int]) -> int:
    """Print a line for each run that failed. Returns the exit code."""
    logs = {run.name: run.sibling_path(".log") for run in jobs}
    for name, code in failed.items():
        state = (
            "stopped, call again to go on"
            if code == STOPPED_EXIT
            else f"failed with exit code {code}"
        )
        print(f"{name}: {state}: {last_line(logs[name])} ({logs[name]})", file=sys.stderr)
    return 1 if failed else 0


def _make_grid(
    request: Request, rates: Rates | None = None, tuning: Tuning | None = None
) -> JobGrid:
    """The runs of each case. The first seed of all entries comes before the second.

    rates: the learning rates that trials have chosen; a method without one keeps that of the case.
    tuning: make the trials instead.
    """
    grid = []
    for case in request.cases:
        scale = case.scale_sizes(request.scale)
        entries = table_entries(request.table, case, scale, request.methods)
        if tuning:
            entries = list(trial_entries(entries, tuning))
        elif rates is not None:
            entries = [replace(entry, lr=rates.get((case, entry.key))) for entry in entries]
        jobs = [
            make_job(
                entry,
                case,
                seed,
                scale=scale,
                rounds=request.rounds_for(case),
                root=request.root,
                folder=request.table_folder,
            )
            for seed in ([tuning.seed] if tuning else request.run_seeds)
            for entry in entries
        ]
        grid.append((case, jobs))
    return grid


def _run_missing(request: Request, jobs: Sequence[Job], missing: Sequence[Job]) -> dict[str, int]:
    """Execute the missing runs on this machine and return the exit codes of those that failed."""

    def report(line):
        return print(line, file=sys.stderr, flush=True)

    _write_configs(request, missing)
    if not missing:
        return {}
    _prepare(request, missing, report)
    # load each data set once here, so that a wrong --root fails once and not in every run
    for source, loss in {(run.config.data.source, run.config.model.loss) for run in missing}:
        load(replace(source, download=request.download), find_loss(loss).targets)
    slots = plan_slots(request.jobs, request.ranks)
    num_started = sum(num_logged_rounds(run.folder) > 0 for run in missing)
    report(
        f"{request.table_folder}: {len(jobs)} runs, {len(jobs) - len(missing)} done, {num_started} "
        f"to go on with, {slots.number} at a time"
    )
    old_handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        tasks = carry.make_tasks(missing, request.ranks)
        return carry.run_tasks(tasks, slots.number, report, slots.gpus)
    finally:
        signal.signal(signal.SIGTERM, old_handler)


def _prepare(request: Request, runs: Sequence[Job], report: Callable[[str], None]) -> None:
    """Make the files that these runs read and that do not exist yet."""
    for case in dict.fromkeys(run.case for run in runs):
        case.prepare(request.root, request.download, report)


def _slurm_lines(request: Request, missing: Sequence[Job], next_call: str) -> Iterator[str]:
    """The lines and the script for Slurm. Both are also written to the table's folder.

    next_call: what the same command does when the array has ended.
    """
    if not missing:
        yield "# every run is done"
        return
    _write_configs(request, missing)
    _prepare(request, missing, lambda line: print(line, file=sys.stderr, flush=True))
    lines = carry.shell_lines(missing, request.ranks)
    lines_file, script = request.table_folder / "jobs.txt", request.table_folder / "array.sbatch"
    text = carry.array_script(
        f"fedlora-{request.table}", len(missing), request.ranks, lines_file, request.table_folder
    )
    write_atomic(lines_file, "".join(f"{line}\n" for line in lines).encode(), request.root_folder)
    write_atomic(script, text.encode(), request.root_folder)
    yield from lines
    yield f"\n# {script}\n{text}"
    yield f"# submit: sbatch {script}; when it has ended, the same command {next_call}"


def _write_configs(request: Request, runs: Sequence[Job]) -> None:
    """Write each run's complete config. Raises ValueError if a run's folder holds another run."""
    for run in runs:
        check_folder(run)
    for run in runs:
        published = run.entry.published
        expected = (
            f"{sheet.format_accuracy(published)} % (best round, full scale)"
            if published
            else "not printed"
        )
        header = (
            f"# {TABLES[request.table].title}: {run.entry.label}, {run.case.description}, seed "
            f"{run.seed}.\n# Made by `fedlora-mpi reproduce {request.table} --scale "
            f"{request.scale}`. In the paper: {expected}.\n"
        )
        with nolinks.open_folder(run.folder.parent, request.root_folder, create=True) as folder_fd:
            nolinks.exists(folder_fd, run.sibling_path(".log"))
        write_atomic(
            run.sibling_path(".yaml"),
            (header + resolved_yaml(run.config)).encode(),
            request.root_folder,
        )
