"""``fedlora-mpi reproduce``: write the configs of a table, execute the missing runs, compare."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace

from ..config import resolved_yaml
from ..data.datasets import load
from ..experiment.loop import STOPPED_EXIT
from ..experiment.pretrain import pretrain
from ..experiment.processes import last_line, plan_slots
from ..store import nolinks
from ..store.files import write_atomic
from . import carry, sheet
from . import fedhl_table as fedhl
from .grid import Case, Job, make_job
from .pfedlora_table import TABLE_NAME
from .registry import TABLES, table_entries
from .request import Request
from .results import ResultStore, check_folder, num_logged_rounds
from .showing import collect_results, publish_case, publish_overview

JobGrid = list[tuple[Case, list[Job]]]  # the runs of each case


def reproduce(request: Request) -> int:
    """Execute the missing runs of a table and print the table. Returns the exit code, 1 if a run
    failed.
    """
    return reproduce_grid(request, _make_grid(request))


def reproduce_grid(request: Request, grid: JobGrid) -> int:
    """``reproduce`` for any grid of runs."""
    jobs = [run for _, runs in grid for run in runs]
    store = ResultStore(request.root_folder)
    missing = [run for run in jobs if not store.find_finished(run)]
    if request.print_jobs:
        print("\n".join(_slurm_lines(request, missing)))
        return 0
    failed = {} if request.collect else _run_missing(request, jobs, missing)
    store = ResultStore(request.root_folder)
    results_of = {case: collect_results(runs, store) for case, runs in grid}
    for case, results in results_of.items():
        publish_case(request, case, results)
    if request.table == TABLE_NAME and len(results_of) > 1:
        publish_overview(request, results_of)
    logs = {run.name: run.sibling_path(".log") for run in jobs}
    for name, code in failed.items():
        state = (
            "stopped, call again to go on"
            if code == STOPPED_EXIT
            else f"failed with exit code {code}"
        )
        print(f"{name}: {state}: {last_line(logs[name])} ({logs[name]})", file=sys.stderr)
    return 1 if failed else 0


def _make_grid(request: Request) -> JobGrid:
    """The runs of each case. The first seed of all entries comes before the second."""
    grid = []
    for case in request.cases:
        scale = case.scale_sizes(request.scale)
        rounds = request.rounds_for(case)
        cells = table_entries(request.table, case, scale, request.methods)
        grid.append(
            (
                case,
                [
                    make_job(
                        cell,
                        case,
                        seed,
                        scale=scale,
                        rounds=rounds,
                        root=request.root,
                        folder=request.table_folder,
                    )
                    for seed in request.run_seeds
                    for cell in cells
                ],
            )
        )
    return grid


def _run_missing(request: Request, jobs: Sequence[Job], missing: Sequence[Job]) -> dict[str, int]:
    """Execute the missing runs on this machine and return the exit codes of those that failed."""

    def report(line):
        return print(line, file=sys.stderr, flush=True)

    _write_configs(request, missing)
    if not missing:
        return {}
    # load each data set once here, so that a wrong --root fails once and not in every run
    for run in {run.case.data: run for run in missing}.values():
        load(replace(run.config.data.source, download=request.download))
    _pretrain_backbones(request, missing, report)
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


def _pretrain_backbones(
    request: Request, missing: Sequence[Job], report: Callable[[str], None]
) -> None:
    """Train the pretrained networks that these runs need and that do not exist yet."""
    cases = {
        run.case.weights: run.case for run in missing if isinstance(run.case, fedhl.FineTuningCase)
    }
    for file, case in cases.items():
        if not file.exists():
            report(
                f"{file}: {case.backbone.epochs} epochs on classes {case.backbone.classes} of "
                f"{case.data}"
            )
            with redirect_stdout(sys.stderr):
                pretrain(
                    case.pretrain_config(request.root),
                    str(file),
                    1,
                    to=file,
                    classes=case.backbone.classes,
                )


def _slurm_lines(request: Request, missing: Sequence[Job]) -> Iterator[str]:
    """The lines and the script for Slurm. Both are also written to the table's folder."""
    if not missing:
        yield "# every run is done"
        return
    _write_configs(request, missing)
    _pretrain_backbones(request, missing, lambda line: print(line, file=sys.stderr, flush=True))
    lines = carry.shell_lines(missing, request.ranks)
    lines_file, script = request.table_folder / "jobs.txt", request.table_folder / "array.sbatch"
    text = carry.array_script(
        f"fedlora-{request.table}", len(missing), request.ranks, lines_file, request.table_folder
    )
    write_atomic(lines_file, "".join(f"{line}\n" for line in lines).encode(), request.root_folder)
    write_atomic(script, text.encode(), request.root_folder)
    yield from lines
    yield f"\n# {script}\n{text}"
    yield (
        f"# submit: sbatch {script}; when it has ended, the same command without --print-jobs "
        "prints the table"
    )


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
