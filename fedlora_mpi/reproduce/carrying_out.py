"""``fedlora-mpi reproduce``: write the configs of a table, carry out what is missing, compare."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from ..config import resolved_yaml
from ..core.escapes import one_line
from ..data.datasets import load
from ..run.loop import STOPPED
from ..run.pretrain import pretrain
from ..store import nolinks
from ..store.files import opened_file, write_atomic
from . import carry, sheet
from . import fedhl_table as fedhl
from .grid import Case, Job, job
from .pfedlora_table import OURS
from .registry import TABLES, entries
from .request import Request
from .results import Shelf, refuse_others, rounds_done
from .showing import found_of, show, show_all

Grid = list[tuple[Case, list[Job]]]  # the runs of each table


def reproduce(asked: Request) -> int:
    """Carry out what is missing of a table and print it; returns the exit code, 1 when a run
    failed.
    """
    return fulfil(asked, _grid(asked))


def fulfil(asked: Request, grid: Grid) -> int:
    """``reproduce`` for any runs."""
    jobs = [run for _, runs in grid for run in runs]
    shelf = Shelf(asked.out)
    missing = [run for run in jobs if not shelf.finished(run)]
    if asked.print_jobs:
        print("\n".join(_listed(asked, missing)))
        return 0
    failed = {} if asked.collect else _carry_out(asked, jobs, missing)
    shelf = Shelf(asked.out)
    found = {case: found_of(runs, shelf) for case, runs in grid}
    for case, results in found.items():
        show(asked, case, results)
    if asked.table == OURS and len(found) > 1:
        show_all(asked, found)
    logs = {run.name: run.beside(".log") for run in jobs}
    for name, code in failed.items():
        state = (
            "stopped, call again to go on" if code == STOPPED else f"failed with exit code {code}"
        )
        print(f"{name}: {state}: {_last_line(logs[name])} ({logs[name]})", file=sys.stderr)
    return 1 if failed else 0


def _grid(asked: Request) -> Grid:
    """The runs of each case; the first seed of all entries comes before the second."""
    grid = []
    for case in asked.cases:
        scale = case.at(asked.scale)
        how = {
            "scale": scale,
            "rounds": asked.rounds_of(case),
            "root": asked.root,
            "folder": asked.folder,
        }
        cells = entries(asked.table, case, scale, asked.methods)
        grid.append(
            (case, [job(cell, case, seed, **how) for seed in asked.chosen_seeds for cell in cells])
        )
    return grid


def _carry_out(asked: Request, jobs: Sequence[Job], missing: Sequence[Job]) -> dict[str, int]:
    """Run what is missing, here."""

    def say(line):
        return print(line, file=sys.stderr, flush=True)

    _write_configs(asked, missing)
    if not missing:
        return {}
    # a mistake in --root shows once, not in every run
    for run in {run.case.data: run for run in missing}.values():
        load(replace(run.config.data.source, download=asked.download))
    _make_backbones(asked, missing, say)
    gpus, at_once = _places(asked)
    begun = sum(rounds_done(run.folder) > 0 for run in missing)
    say(
        f"{asked.folder}: {len(jobs)} runs, {len(jobs) - len(missing)} done, {begun} to go on "
        f"with, {at_once} at a time"
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return carry.work(carry.tasks(missing, asked.ranks), at_once, say, gpus)
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_backbones(asked: Request, missing: Sequence[Job], say: Callable[[str], None]) -> None:
    """Train the networks that these runs begin with, where they are not there."""
    cases = {run.case.weights: run.case for run in missing if isinstance(run.case, fedhl.Tuning)}
    for file, case in cases.items():
        if not file.exists():
            say(
                f"{file}: {case.backbone.epochs} epochs on classes {case.backbone.classes} of "
                f"{case.data}"
            )
            with redirect_stdout(sys.stderr):
                pretrain(
                    case.before(asked.root), str(file), 1, to=file, classes=case.backbone.classes
                )


def _places(asked: Request) -> tuple[list[str], int]:
    """(GPUs to deal to the runs, how many runs at a time)."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if count and asked.ranks == 1:
        return visible, asked.jobs or count
    return [], asked.jobs or max(1, (count or len(os.sched_getaffinity(0))) // asked.ranks)


def _listed(asked: Request, missing: Sequence[Job]) -> Iterator[str]:
    """The lines and the script for Slurm, which are also written into the table's folder."""
    if not missing:
        yield "# every run is done"
        return
    _write_configs(asked, missing)
    _make_backbones(asked, missing, lambda line: print(line, file=sys.stderr, flush=True))
    lines = carry.lines(missing, asked.ranks)
    listed, script = asked.folder / "jobs.txt", asked.folder / "array.sbatch"
    text = carry.array(f"fedlora-{asked.table}", len(missing), asked.ranks, listed, asked.folder)
    write_atomic(listed, "".join(f"{line}\n" for line in lines).encode(), asked.out)
    write_atomic(script, text.encode(), asked.out)
    yield from lines
    yield f"\n# {script}\n{text}"
    yield (
        f"# submit: sbatch {script}; when it has ended, the same command without --print-jobs "
        "prints the table"
    )


def _write_configs(asked: Request, runs: Sequence[Job]) -> None:
    """A config for each run, complete in itself. Raises ValueError when a folder holds another run."""
    for run in runs:
        refuse_others(run)
    for run in runs:
        said = run.entry.published
        expected = f"{sheet.show(said)} % (best round, full scale)" if said else "not printed"
        head = (
            f"# {TABLES[asked.table].title}: {run.entry.label}, {run.case.said}, seed "
            f"{run.seed}.\n# Made by `fedlora-mpi reproduce {asked.table} --scale {asked.scale}`. "
            f"In the paper: {expected}.\n"
        )
        with nolinks.opened_folder(run.folder.parent, asked.out, make=True) as home:
            nolinks.is_there(home, run.beside(".log"))
        write_atomic(run.beside(".yaml"), (head + resolved_yaml(run.config)).encode(), asked.out)


def _last_line(log: Path) -> str:
    with opened_file(log) as file:
        said = [
            line.strip()
            for line in file.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
    return one_line(said[-1]) if said else "no output"
