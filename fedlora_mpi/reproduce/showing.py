"""The tables and figures of finished runs, printed and written to files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..store import nolinks
from ..store.files import write_atomic
from . import costs, picture, sheet
from . import fedhl_shift_table as shift
from . import fedhl_table as fedhl
from . import fedhl_text_table as fedhl_text
from . import neighbours_table as neighbours
from .grid import Case, Job
from .paper import CLAIMS
from .pfedlora_table import PAPER_TARGET, TABLE_NAME
from .rank_sheet import rank_sheet
from .registry import TABLES
from .request import Request
from .results import Result, ResultStore
from .sheet import Cell, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CaseResults(NamedTuple):
    """The results of the runs of a case."""

    cells: list[Cell]
    results: dict[str, list[Result]]  # key of the entry -> its finished seeds


def collect_results(runs: Sequence[Job], shelf: ResultStore) -> CaseResults:
    """The results of the finished runs."""
    finished = [result for run in runs if (result := shelf.result(run))]
    entry_of = {run.entry.key: run.entry for run in runs}
    results = {key: [r for r in finished if r.job.entry.key == key] for key in entry_of}
    return CaseResults(
        [Cell.from_results(entry, results[key]) for key, entry in entry_of.items()], results
    )


def publish_case(request: Request, case: Case, case_results: CaseResults) -> None:
    """Print the tables of a case and write them as text, Markdown and CSV. Where the table has a
    figure, write it as PNG.
    """
    title = f"{TABLES[request.table].title}; {case.description}, scale {request.scale}"
    for suffix, table_sheet in _make_sheets(request, case, title, case_results).items():
        _publish_sheet(request, case.name + suffix, table_sheet)
    if any(case_results.results.values()):
        for suffix, figure in _figure_makers(request.table, title, *case_results).items():
            file = request.table_folder / f"{case.name}{suffix}.png"
            print(f"- drawn as {_save_figure(figure, file, request.root_folder)}")
    print()


def _publish_sheet(request: Request, name: str, table_sheet: Sheet) -> None:
    """Print a table and write it as text, Markdown and CSV."""
    stem = request.table_folder / name
    with nolinks.open_folder(request.table_folder, request.root_folder, create=True):
        pass
    for suffix, text in (
        (".txt", table_sheet.text() + "\n"),
        (".md", table_sheet.markdown()),
        (".csv", table_sheet.csv()),
    ):
        write_atomic(stem.with_name(stem.name + suffix), text.encode(), request.root_folder)
    print(table_sheet.text())
    print(f"- also as {stem}.txt, .md, .csv\n")


def _make_sheets(
    request: Request, case: Case, title: str, case_results: CaseResults
) -> dict[str, Sheet]:
    """The tables of a case: {suffix of the file names: table}."""
    seeds, notes, caution = (
        len(request.run_seeds),
        [TABLES[request.table].open_choices],
        _difference_note(request, case),
    )
    cells, results = case_results
    if request.table == "fig6":
        return {"": sheet.drift_sheet(title, caution, notes, results)}
    if request.table == "fig7":
        return {"": sheet.client_sheet(title, caution, notes, results)}
    if request.table == TABLE_NAME:
        sheets = {"": costs.accuracy_sheet(title, caution, notes, cells, seeds)}
        targets = _choose_targets(request, case, results)
        for suffix, (percent, target_notes) in targets.items():
            sheets[suffix] = costs.target_sheet(
                title, caution, target_notes, cells, results, percent
            )
        percents = [percent for percent, _ in targets.values()]
        sheets["-claims"] = costs.claims_sheet(title, caution, case.data, cells, results, percents)
        return sheets | {
            "-gains": costs.client_gains_sheet(f"{title}; each client", caution, [], cells, results)
        }
    if request.table == "fig4":
        notes.append(f"the paper: {CLAIMS['fig4']}")
    if request.table == fedhl.TABLE_NAME:
        return {"": fedhl.fedhl_sheet(title, caution, notes, cells, seeds, results)}
    if request.table in (shift.TABLE_NAME, fedhl_text.TABLE_NAME):
        tuning = TABLES[request.table].tuning
        assert tuning
        return {"": rank_sheet(title, caution, notes, cells, seeds, results, tuning)}
    if request.table == neighbours.TABLE_NAME:
        return {"": neighbours.skew_sheet(title, caution, notes, cells, seeds, results)}
    if request.table == "table2":
        return {"": sheet.lora_rank_sheet(title, caution, notes, cells, seeds)}
    return {
        "": sheet.comparison_sheet(
            title, caution, notes, cells, seeds, TABLES[request.table].std_note
        )
    }


def _choose_targets(
    request: Request, case: Case, results: Mapping[str, Sequence[Result]]
) -> dict[str, tuple[float, list[str]]]:
    """The target accuracies: {suffix of the file names: (accuracy in per cent, how it was chosen)}.

    These are the requested targets. Without a request, they are the highest accuracy that all
    methods reach and, at full scale, the paper's target.
    """
    if request.target:
        return {f"-target{percent:g}": (percent, []) for percent in request.target}
    percent, failed = costs.common_target(results)
    target_note = "target: the highest accuracy that every method reaches with every seed"
    if failed:
        target_note += (
            f", but for {', '.join(failed)}, more than {costs.MAX_GAP:g} percentage points below "
            "the best method"
        )
    targets = {"-target": (percent, [target_note])}
    if request.is_full_scale:
        targets[f"-target{PAPER_TARGET[case.data]:g}"] = (
            PAPER_TARGET[case.data],
            ["target: the paper's, from memory"],
        )
    return targets


def publish_overview(request: Request, results_of: Mapping[Case, CaseResults]) -> None:
    """Print and write the best accuracies of all cases, as ``publish_case`` does."""
    cautions = dict.fromkeys(_difference_note(request, case) for case in results_of)
    tables = {case.name: cells for case, (cells, _) in results_of.items()}
    notes = [TABLES[request.table].open_choices]
    title = f"{TABLES[request.table].title}; best accuracy, scale {request.scale}"
    _publish_sheet(
        request,
        "overview",
        costs.overview_sheet(title, " ".join(cautions), notes, tables, len(request.run_seeds)),
    )


def _difference_note(request: Request, case: Case) -> str:
    """How these runs differ from the paper's; "" if they do not."""
    sizes = (
        case.scale_sizes(request.scale)
        ._replace(rounds=request.rounds_for(case))
        .describe_cut(case.paper_sizes, case.full_scale_source)
    )
    differences = ", ".join(filter(None, (sizes, case.data_difference)))
    return (
        f"NOT the paper's experiment: {differences}. Compare orders and signs, not numbers."
        if differences
        else ""
    )


def _figure_makers(
    table: str, title: str, cells: Sequence[Cell], results: Mapping[str, Sequence[Result]]
) -> "dict[str, Callable[[], Figure]]":
    """The figures of a table: {suffix of the file names: function that draws it}."""
    if table == TABLE_NAME:
        cost_figures = {
            f"-{cost}": partial(picture.accuracy_by_cost, cost, cells, results, title)
            for cost in costs.UNITS
        }
        return cost_figures | {"-gains": lambda: picture.gains_figure(cells, results, title)}
    figures = {
        "table2": lambda: picture.lora_rank_heatmap(cells, title),
        "fig4": lambda: picture.epochs_figure(cells, title),
        "fig6": lambda: picture.drift_figure(results, title),
        "fig7": lambda: picture.client_scatter(results, title),
    }
    return {"": figures[table]} if table in figures else {}


def _save_figure(figure: "Callable[[], Figure]", path: Path, root: Path) -> str:
    """The file of the figure, or the reason why there is none."""
    try:
        picture.save_figure(figure(), path, root)
    except ValueError as error:
        return f"nothing ({error})"
    return str(path)
