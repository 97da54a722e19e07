"""``fedlora-mpi reproduce``: write the configs of a table, carry out what is missing, compare."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..config import resolved_yaml
from ..data.datasets import load
from ..pretrain import pretrain
from ..run import STOPPED
from ..store.files import write_atomic
from . import agnews, carry, costs, fedhl, picture, sheet
from .fedlora import DATA, Alpha
from .grid import Case, Job, job
from .paper import CLAIMS
from .pfedlora import OURS, PARTICIPATION, TARGET, Crowd
from .results import Result, Shelf, refuse_others, rounds_done
from .sheet import Cell, Sheet
from .tables import TABLES, entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Grid = list[tuple[Case, list[Job]]]  # the runs of each table


@dataclass(frozen=True)
class Request:
    """The command line. Empty ``methods``: all of the table; ``rounds``, ``jobs`` None: by scale, by machine.

    data, none: cifar10, of ``table6`` ag_news, of ``fedhl`` both. alpha: of all but ``pfedlora``, none: 0.1, of ``table6``
    1.0, of ``fedhl`` 0.5. text_train: of ``table6`` and ``fedhl``, a file in AG_NEWS. width, participation: of ``fedhl``,
    none: all. clients, homogeneous, target (per cent): of ``pfedlora``;
    no clients: 10, 50, 100 at full scale, 10 at small; no target: see ``_targets``.
    """

    table: str
    data: Sequence[str] = ()
    alpha: Sequence[float] = ()
    clients: Sequence[int] = ()
    text_train: str = ""
    homogeneous: bool = False
    width: Sequence[str] = ()
    participation: Sequence[float] = ()
    target: Sequence[float] = ()
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
        if self.table == OURS:
            foreign = {"alpha": self.alpha}
        else:
            foreign = {"clients": self.clients, "homogeneous": self.homogeneous, "target": self.target}
        if self.table not in (agnews.OURS, fedhl.OURS):
            foreign["text-train"] = self.text_train
        if self.table != fedhl.OURS:
            foreign |= {"width": self.width, "participation": self.participation}
        for name, value in foreign.items():
            if value:
                raise ValueError(f"--{name}: {self.table} has no such choice; leave it out")

    @property
    def full(self) -> bool:
        return self.scale == "full"

    @property
    def cases(self) -> list[Case]:
        """What a table is made for, each. Raises ValueError."""
        if self.table == agnews.OURS:
            file, pairs = self.text_train or agnews.WHOLE, product(self.data or (agnews.DATA,), self.alpha or (agnews.ALPHA,))
            return [agnews.Texts(data, alpha, file) for data, alpha in pairs]
        if self.table == fedhl.OURS:
            ways = product(
                self.data or fedhl.BACKBONES,
                self.width or fedhl.WIDTHS,
                self.participation or fedhl.PARTICIPATION,
                self.alpha or (fedhl.ALPHA,),
            )
            file = self.text_train or agnews.WHOLE
            return [fedhl.Tuning(data, width, part, self.folder, alpha, file) for data, width, part, alpha in ways]
        images = self.data or ("cifar10",)
        if self.table == OURS:
            clients = self.clients or (tuple(PARTICIPATION) if self.full else (10,))
            return [Crowd(data, number, self.homogeneous) for data, number in product(images, clients)]
        if agnews.DATA in images:
            raise ValueError(f"--data = {agnews.DATA}: {self.table} has {', '.join(DATA)}; texts are {agnews.OURS}'s")
        return [Alpha(data, alpha) for data, alpha in product(images, self.alpha or (0.1,))]

    @property
    def chosen_seeds(self) -> Sequence[int]:
        return self.seeds or ((1, 2, 3) if self.full else (1,))

    def rounds_of(self, case: Case) -> int:
        """How many rounds its runs have."""
        return self.rounds or case.at(self.scale).rounds

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
    jobs = [run for _, runs in grid for run in runs]
    shelf = Shelf(asked.out)
    missing = [run for run in jobs if not shelf.finished(run)]
    if asked.print_jobs:
        print("\n".join(_listed(asked, missing)))
        return 0
    failed = {} if asked.collect else _carry_out(asked, jobs, missing)
    shelf = Shelf(asked.out)
    found = {case: _found(runs, shelf) for case, runs in grid}
    for case, results in found.items():
        _show(asked, case, results)
    if asked.table == OURS and len(found) > 1:
        _write(asked, "overview", _overview(asked, found))
    logs = {run.name: run.beside(".log") for run in jobs}
    for name, code in failed.items():
        state = "stopped, call again to go on" if code == STOPPED else f"failed with exit code {code}"
        print(f"{name}: {state}: {_last_line(logs[name])} ({logs[name]})", file=sys.stderr)
    return 1 if failed else 0


def _grid(asked: Request) -> Grid:
    """The runs of each case; the first seed of all entries comes before the second."""
    grid = []
    for case in asked.cases:
        scale = case.at(asked.scale)
        how = {"scale": scale, "rounds": asked.rounds_of(case), "root": asked.root, "folder": asked.folder}
        cells = entries(asked.table, case, scale, asked.methods)
        grid.append((case, [job(cell, case, seed, **how) for seed in asked.chosen_seeds for cell in cells]))
    return grid


def _carry_out(asked: Request, jobs: Sequence[Job], missing: Sequence[Job]) -> dict[str, int]:
    """Run what is missing, here."""
    say = lambda line: print(line, file=sys.stderr, flush=True)
    _write_configs(asked, missing)
    if not missing:
        return {}
    for run in {run.case.data: run for run in missing}.values():  # a mistake in --root shows once, not in every run
        load(replace(run.config.data.source, download=asked.download))
    _make_backbones(asked, missing, say)
    gpus, at_once = _places(asked)
    begun = sum(rounds_done(run.folder) > 0 for run in missing)
    say(f"{asked.folder}: {len(jobs)} runs, {len(jobs) - len(missing)} done, {begun} to go on with, {at_once} at a time")
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
            say(f"{file}: {case.backbone.epochs} epochs on classes {case.backbone.classes} of {case.data}")
            with redirect_stdout(sys.stderr):
                pretrain(case.before(asked.root), str(file), 1, to=file, classes=case.backbone.classes)


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
        expected = f"{sheet.show(said)} % (best round, full scale)" if said else "not printed"
        head = (
            f"# {TABLES[asked.table].title}: {run.entry.label}, {run.case.said}, seed {run.seed}.\n"
            f"# Made by `fedlora-mpi reproduce {asked.table} --scale {asked.scale}`. In the paper: {expected}.\n"
        )
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(run.beside(".yaml"), (head + resolved_yaml(run.config)).encode())


class Found(NamedTuple):
    """What the runs of a case have brought."""

    cells: list[Cell]
    results: dict[str, list[Result]]  # of each entry, the finished seeds


def _found(runs: Sequence[Job], shelf: Shelf) -> Found:
    """The finished among the runs."""
    there = [result for run in runs if (result := shelf.result(run))]
    over = {run.entry.key: run.entry for run in runs}
    results = {key: [r for r in there if r.job.entry.key == key] for key in over}
    return Found([Cell.of(entry, results[key]) for key, entry in over.items()], results)


def _show(asked: Request, case: Case, found: Found) -> None:
    """Print what a table has to say of a case and write it as text, Markdown, CSV and, where it is a picture, PNG."""
    title = f"{TABLES[asked.table].title}; {case.said}, scale {asked.scale}"
    for end, made in _sheets(asked, case, title, found).items():
        _write(asked, case.name + end, made)
    if any(found.results.values()):
        for end, figure in _pictures(asked.table, title, *found).items():
            print(f"- drawn as {_draw(figure, asked.folder / f'{case.name}{end}.png')}")
    print()


def _write(asked: Request, name: str, made: Sheet) -> None:
    """Print a table and write it in all forms."""
    stem = asked.folder / name
    asked.folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".txt", made.text() + "\n"), (".md", made.markdown()), (".csv", made.csv())):
        write_atomic(stem.with_name(stem.name + suffix), text.encode())
    print(made.text())
    print(f"- also as {stem}.txt, .md, .csv\n")


def _sheets(asked: Request, case: Case, title: str, found: Found) -> dict[str, Sheet]:
    """End of the file names -> table."""
    seeds, notes, caution = len(asked.chosen_seeds), [TABLES[asked.table].rule], _caution(asked, case)
    cells, results = found
    if asked.table == "fig6":
        return {"": sheet.drift(title, caution, notes, results)}
    if asked.table == "fig7":
        return {"": sheet.each_client(title, caution, notes, results)}
    if asked.table == OURS:
        made = {"": costs.accuracy(title, caution, notes, cells, seeds)}
        for end, (percent, why) in _targets(asked, case, results).items():
            made[end] = costs.target(title, caution, why, cells, results, percent)
        return made | {"-gains": costs.each_client(f"{title}; each client", caution, [], cells, results)}
    if asked.table == "fig4":
        notes.append(f"the paper: {CLAIMS['fig4']}")
    if asked.table == fedhl.OURS:
        return {"": fedhl.sheet(title, caution, notes, cells, seeds, results)}
    if asked.table == "table2":
        return {"": sheet.ranks(title, caution, notes, cells, seeds)}
    return {"": sheet.compare(title, caution, notes, cells, seeds, TABLES[asked.table].papers)}


def _targets(asked: Request, case: Case, results: Mapping[str, Sequence[Result]]) -> dict[str, tuple[float, list[str]]]:
    """End of the file names -> (accuracy in per cent, how it was chosen).

    Those asked for, or the highest that all methods reach, and at full scale the paper's.
    """
    if asked.target:
        return {f"-target{percent:g}": (percent, []) for percent in asked.target}
    percent, failed = costs.common(results)
    why = "target: the highest accuracy that every method reaches with every seed"
    if failed:
        why += f", but for {', '.join(failed)}, more than {costs.FAILS:g} percentage points below the best method"
    chosen = {"-target": (percent, [why])}
    if asked.full:
        chosen[f"-target{TARGET[case.data]:g}"] = TARGET[case.data], ["target: the paper's, from memory"]
    return chosen


def _overview(asked: Request, found: Mapping[Case, Found]) -> Sheet:
    """The best accuracy of all cases."""
    cautions = dict.fromkeys(_caution(asked, case) for case in found)
    tables = {case.name: cells for case, (cells, _) in found.items()}
    notes = [TABLES[asked.table].rule]
    title = f"{TABLES[asked.table].title}; best accuracy, scale {asked.scale}"
    return costs.overview(title, " ".join(cautions), notes, tables, len(asked.chosen_seeds))


def _caution(asked: Request, case: Case) -> str:
    """What sets these runs apart from the paper's; "" when nothing does."""
    sizes = case.at(asked.scale)._replace(rounds=asked.rounds_of(case)).cut(case.at("full"), case.whose)
    cut = ", ".join(filter(None, (sizes, case.less)))
    return f"NOT the paper's experiment: {cut}. Compare orders and signs, not numbers." if cut else ""


def _pictures(
    table: str, title: str, cells: Sequence[Cell], results: Mapping[str, Sequence[Result]]
) -> "dict[str, Callable[[], Figure]]":
    """End of the file names -> how to draw it."""
    if table == OURS:
        drawn = {f"-{cost}": partial(picture.against, cost, cells, results, title) for cost in costs.UNITS}
        return drawn | {"-gains": lambda: picture.gains(cells, results, title)}
    figures = {
        "table2": lambda: picture.ranks(cells, title),
        "fig4": lambda: picture.epochs(cells, title),
        "fig6": lambda: picture.drift(results, title),
        "fig7": lambda: picture.each_client(results, title),
    }
    return {"": figures[table]} if table in figures else {}


def _draw(figure: "Callable[[], Figure]", path: Path) -> str:
    """The file of the picture, or why there is none."""
    try:
        picture.save(figure(), path)
    except ValueError as error:
        return f"nothing ({error})"
    return str(path)


def _last_line(log: Path) -> str:
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1] if said else "no output"
