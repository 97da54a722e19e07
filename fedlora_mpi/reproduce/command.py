"""``fedlora-mpi reproduce``: write the configs of a table, carry out what is missing, compare."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import resolved_yaml
from ..data.datasets import load
from ..store.files import write_atomic
from . import carry, picture, sheet
from .grid import FULL, SCALES, TABLES, Entry, Job, Scale, entries, job
from .paper import CLAIMS
from .results import Result, Shelf, refuse_others, rounds_done
from .sheet import Cell, Sheet

Grid = list[tuple[str, float, list[Job]]]  # (data set, alpha, runs) of each table


@dataclass(frozen=True)
class Request:
    """The command line. Empty ``methods``: all of the table; ``rounds``, ``jobs`` None: by scale, by machine."""

    table: str
    data: Sequence[str] = ("cifar10",)
    alpha: Sequence[float] = (0.1,)
    seeds: Sequence[int] = ()  # none: 1, 2, 3 at full scale, 1 at small
    rounds: int | None = None
    methods: Sequence[str] = ()
    scale: str = "small"
    ranks: int = 1
    jobs: int | None = None
    root: str = "~/data"
    download: bool = False
    output: Path | None = None
    print_jobs: bool = False
    collect: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("ranks", self.ranks), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} = {value}: must be an integer of at least 1")

    @property
    def size(self) -> Scale:
        return SCALES[self.scale]

    @property
    def chosen_seeds(self) -> Sequence[int]:
        return self.seeds or ((1, 2, 3) if self.size == FULL else (1,))

    @property
    def chosen_rounds(self) -> int:
        return self.rounds or self.size.rounds

    @property
    def out(self) -> Path:
        return (self.output or Path("runs") / f"reproduce-{self.scale}").expanduser().resolve()

    @property
    def folder(self) -> Path:
        return self.out / self.table


def reproduce(asked: Request) -> int:
    """Carry out what is missing of a table and print it; returns the exit code, 1 when a run failed."""
    return fulfil(asked, _grid(asked))


def fulfil(asked: Request, grid: Grid) -> int:
    """``reproduce`` for any runs."""
    jobs = [run for _, _, runs in grid for run in runs]
    shelf = Shelf(asked.out)
    missing = [run for run in jobs if not shelf.finished(run)]
    if asked.print_jobs:
        print("\n".join(_listed(asked, missing)))
        return 0
    failed = {} if asked.collect else _carry_out(asked, jobs, missing)
    shelf = Shelf(asked.out)
    for data, alpha, runs in grid:
        _show(asked, data, alpha, runs, shelf)
    logs = {run.name: run.beside(".log") for run in jobs}
    for name, code in failed.items():
        state = "stopped, call again to go on" if code == carry.STOPPED else f"failed with exit code {code}"
        print(f"{name}: {state}: {_last_line(logs[name])} ({logs[name]})", file=sys.stderr)
    return 1 if failed else 0


def _grid(asked: Request) -> Grid:
    """The runs of each data set and alpha; the first seed of all entries comes before the second."""
    how = {"scale": asked.size, "rounds": asked.chosen_rounds, "root": asked.root, "folder": asked.folder}
    grid = []
    for data in asked.data:
        for alpha in asked.alpha:
            cells = entries(asked.table, data, alpha, asked.size, asked.methods)
            grid.append((data, alpha, [job(c, data, alpha, seed, **how) for seed in asked.chosen_seeds for c in cells]))
    return grid


def _carry_out(asked: Request, jobs: Sequence[Job], missing: Sequence[Job]) -> dict[str, int]:
    """Run what is missing, here."""
    say = lambda line: print(line, file=sys.stderr, flush=True)
    _write_configs(asked, missing)
    if not missing:
        return {}
    for run in {run.data: run for run in missing}.values():  # a mistake in --root shows once, not in every run
        load(replace(run.config.data.source, download=asked.download))
    gpus, at_once = _places(asked)
    begun = sum(rounds_done(run.folder) > 0 for run in missing)
    say(f"{asked.folder}: {len(jobs)} runs, {len(jobs) - len(missing)} done, {begun} to go on with, {at_once} at a time")
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return carry.work(carry.tasks(missing, asked.ranks), at_once, say, gpus)
    finally:
        signal.signal(signal.SIGTERM, before)


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
    lines = carry.lines(missing, asked.ranks)
    listed, script = asked.folder / "jobs.txt", asked.folder / "array.sbatch"
    text = carry.array(f"fedlora-{asked.table}", len(missing), asked.ranks, listed, asked.folder)
    write_atomic(listed, "".join(f"{line}\n" for line in lines).encode())
    write_atomic(script, text.encode())
    yield from lines
    yield f"\n# {script}\n{text}"
    yield f"# submit: sbatch {script}; when it has ended, the same command without --print-jobs prints the table"


def _write_configs(asked: Request, runs: Sequence[Job]) -> None:
    """A config for each run, complete in itself. Raises ValueError when a folder holds another run."""
    for run in runs:
        refuse_others(run)
    for run in runs:
        said = run.entry.published
        expected = f"{said.mean} ± {said.std} % (best round, 3 seeds, full scale)" if said else "not printed"
        head = (
            f"# {TABLES[asked.table].title}: {run.entry.label}, {run.data}, alpha {run.alpha:g}, seed {run.seed}.\n"
            f"# Made by `fedlora-mpi reproduce {asked.table} --scale {asked.scale}`. In the paper: {expected}.\n"
        )
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(run.beside(".yaml"), (head + resolved_yaml(run.config)).encode())


def _show(asked: Request, data: str, alpha: float, runs: Sequence[Job], shelf: Shelf) -> None:
    """Print one table and write it as text, Markdown, CSV and, where it is a picture, PNG."""
    cells: list[Entry] = list({run.entry.key: run.entry for run in runs}.values())
    found = [result for run in runs if (result := shelf.result(run))]
    results = {e.key: [r for r in found if r.job.entry.key == e.key] for e in cells}
    title = f"{TABLES[asked.table].title}; {data}, alpha {alpha:g}, scale {asked.scale}"
    made = _sheet(asked, title, cells, results)
    stem = asked.folder / f"{data}-alpha{alpha:g}"
    asked.folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".txt", made.text() + "\n"), (".md", made.markdown()), (".csv", made.csv())):
        write_atomic(stem.with_name(stem.name + suffix), text.encode())
    print(made.text())
    drawn = _draw(asked.table, title, cells, results, stem.with_name(f"{stem.name}.png")) if found else ""
    print(f"- also as {stem}.txt, .md, .csv{drawn}\n")


def _sheet(asked: Request, title: str, cells: Sequence[Entry], results: dict[str, list[Result]]) -> Sheet:
    seeds, notes, caution = len(asked.chosen_seeds), [TABLES[asked.table].rule], _caution(asked)
    if asked.table == "fig6":
        return sheet.drift(title, caution, notes, results)
    if asked.table == "fig7":
        return sheet.each_client(title, caution, notes, results)
    over = [Cell.of(entry, results[entry.key]) for entry in cells]
    if asked.table == "fig4":
        notes.append(f"the paper: {CLAIMS['fig4']}")
    return (sheet.ranks if asked.table == "table2" else sheet.compare)(title, caution, notes, over, seeds)


def _caution(asked: Request) -> str:
    """What sets these runs apart from the paper's; "" when nothing does."""
    cut = asked.size._replace(rounds=asked.chosen_rounds).cut()
    return f"NOT the paper's experiment: {cut}. Compare orders and signs, not numbers." if cut else ""


def _draw(table: str, title: str, cells: Sequence[Entry], results: dict[str, list[Result]], path: Path) -> str:
    """What to say of the picture."""
    over = [Cell.of(entry, results[entry.key]) for entry in cells]
    figures = {
        "table2": lambda: picture.ranks(over, title),
        "fig4": lambda: picture.epochs(over, title),
        "fig6": lambda: picture.drift(results, title),
        "fig7": lambda: picture.each_client(results, title),
    }
    if table not in figures:
        return ""
    try:
        picture.save(figures[table](), path)
    except ValueError as error:
        return f" ({error})"
    return ", .png"


def _last_line(log: Path) -> str:
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1] if said else "no output"
