"""The tables and pictures of finished runs, printed and written."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..store import nolinks
from ..store.files import write_atomic
from . import costs, picture, sheet
from . import fedhl_table as fedhl
from .grid import Case, Job
from .paper import CLAIMS
from .pfedlora_table import OURS, TARGET
from .registry import TABLES
from .request import Request
from .results import Result, Shelf
from .sheet import Cell, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Found(NamedTuple):
    """What the runs of a case have brought."""

    cells: list[Cell]
    results: dict[str, list[Result]]  # of each entry, the finished seeds


def found_of(runs: Sequence[Job], shelf: Shelf) -> Found:
    """The finished among the runs."""
    there = [result for run in runs if (result := shelf.result(run))]
    over = {run.entry.key: run.entry for run in runs}
    results = {key: [r for r in there if r.job.entry.key == key] for key in over}
    return Found([Cell.of(entry, results[key]) for key, entry in over.items()], results)


def show(asked: Request, case: Case, found: Found) -> None:
    """Print what a table has to say of a case and write it as text, Markdown, CSV and, where it is
    a picture, PNG.
    """
    title = f"{TABLES[asked.table].title}; {case.said}, scale {asked.scale}"
    for end, made in _sheets(asked, case, title, found).items():
        _write(asked, case.name + end, made)
    if any(found.results.values()):
        for end, figure in _pictures(asked.table, title, *found).items():
            print(f"- drawn as {_draw(figure, asked.folder / f'{case.name}{end}.png', asked.out)}")
    print()


def _write(asked: Request, name: str, made: Sheet) -> None:
    """Print a table and write it in all forms."""
    stem = asked.folder / name
    with nolinks.opened_folder(asked.folder, asked.out, make=True):
        pass
    for suffix, text in (
        (".txt", made.text() + "\n"),
        (".md", made.markdown()),
        (".csv", made.csv()),
    ):
        write_atomic(stem.with_name(stem.name + suffix), text.encode(), asked.out)
    print(made.text())
    print(f"- also as {stem}.txt, .md, .csv\n")


def _sheets(asked: Request, case: Case, title: str, found: Found) -> dict[str, Sheet]:
    """End of the file names -> table."""
    seeds, notes, caution = (
        len(asked.chosen_seeds),
        [TABLES[asked.table].rule],
        _caution(asked, case),
    )
    cells, results = found
    if asked.table == "fig6":
        return {"": sheet.drift(title, caution, notes, results)}
    if asked.table == "fig7":
        return {"": sheet.each_client(title, caution, notes, results)}
    if asked.table == OURS:
        made = {"": costs.accuracy(title, caution, notes, cells, seeds)}
        for end, (percent, why) in _targets(asked, case, results).items():
            made[end] = costs.target(title, caution, why, cells, results, percent)
        return made | {
            "-gains": costs.each_client(f"{title}; each client", caution, [], cells, results)
        }
    if asked.table == "fig4":
        notes.append(f"the paper: {CLAIMS['fig4']}")
    if asked.table == fedhl.OURS:
        return {"": fedhl.sheet(title, caution, notes, cells, seeds, results)}
    if asked.table == "table2":
        return {"": sheet.ranks(title, caution, notes, cells, seeds)}
    return {"": sheet.compare(title, caution, notes, cells, seeds, TABLES[asked.table].papers)}


def _targets(
    asked: Request, case: Case, results: Mapping[str, Sequence[Result]]
) -> dict[str, tuple[float, list[str]]]:
    """End of the file names -> (accuracy in per cent, how it was chosen).

    Those asked for, or the highest that all methods reach, and at full scale the paper's.
    """
    if asked.target:
        return {f"-target{percent:g}": (percent, []) for percent in asked.target}
    percent, failed = costs.common(results)
    why = "target: the highest accuracy that every method reaches with every seed"
    if failed:
        why += (
            f", but for {', '.join(failed)}, more than {costs.FAILS:g} percentage points below "
            "the best method"
        )
    chosen = {"-target": (percent, [why])}
    if asked.full:
        chosen[f"-target{TARGET[case.data]:g}"] = (
            TARGET[case.data],
            ["target: the paper's, from memory"],
        )
    return chosen


def show_all(asked: Request, found: Mapping[Case, Found]) -> None:
    """The best accuracy of all cases, in the same ways."""
    cautions = dict.fromkeys(_caution(asked, case) for case in found)
    tables = {case.name: cells for case, (cells, _) in found.items()}
    notes = [TABLES[asked.table].rule]
    title = f"{TABLES[asked.table].title}; best accuracy, scale {asked.scale}"
    _write(
        asked,
        "overview",
        costs.overview(title, " ".join(cautions), notes, tables, len(asked.chosen_seeds)),
    )


def _caution(asked: Request, case: Case) -> str:
    """What sets these runs apart from the paper's; "" when nothing does."""
    sizes = (
        case.at(asked.scale)._replace(rounds=asked.rounds_of(case)).cut(case.at("full"), case.whose)
    )
    cut = ", ".join(filter(None, (sizes, case.less)))
    return (
        f"NOT the paper's experiment: {cut}. Compare orders and signs, not numbers." if cut else ""
    )


def _pictures(
    table: str, title: str, cells: Sequence[Cell], results: Mapping[str, Sequence[Result]]
) -> "dict[str, Callable[[], Figure]]":
    """End of the file names -> how to draw it."""
    if table == OURS:
        drawn = {
            f"-{cost}": partial(picture.against, cost, cells, results, title)
            for cost in costs.UNITS
        }
        return drawn | {"-gains": lambda: picture.gains(cells, results, title)}
    figures = {
        "table2": lambda: picture.ranks(cells, title),
        "fig4": lambda: picture.epochs(cells, title),
        "fig6": lambda: picture.drift(results, title),
        "fig7": lambda: picture.each_client(results, title),
    }
    return {"": figures[table]} if table in figures else {}


def _draw(figure: "Callable[[], Figure]", path: Path, below: Path) -> str:
    """The file of the picture, or why there is none."""
    try:
        picture.save(figure(), path, below)
    except ValueError as error:
        return f"nothing ({error})"
    return str(path)
