"""Write a report folder: one self-contained page, and its figures and tables as files.

Figures are PNG and PDF files; tables are CSV, Markdown and LaTeX files.
"""

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ... import __version__
from ...core import escapes
from ...core.units import format_bytes
from ...store import nolinks
from ...store.files import check_plain_name, open_for_reading, write_atomic
from ..groups import (
    Group,
    RunGroups,
    RunLog,
    Stat,
    count_clients,
    count_seeds,
    format_counts,
    format_setting,
    group_runs,
)
from ..paired import compare_leaders, missing_runs_lines, winner_lines
from ..runs import clients_table, rounds_table
from . import clients, curves, personal, ranks, sweeps, tables, topology
from .crowd import assign_looks
from .style import PageFigure, plot_style, render_files
from .table import Table, format_percent

PAGE, FIGURES, TABLES = "report.html", "figures", "tables"
_FILE_KINDS = {FIGURES: ("png", "pdf"), TABLES: ("csv", "md", "tex")}
# A page of ours has this tag. Its content lists the report's other files.
_PAGE_MARK = '<meta name="fedlora-mpi" content="{}">'


class PageContent(NamedTuple):
    """The content of the page, in its order."""

    run_groups: RunGroups
    tables: list[Table]
    figures: list[PageFigure]
    notes: list[str]


def write_report(
    paths: Sequence[Path],
    folder: Path,
    wanted_of_sweep: Mapping[Path, Sequence[Path]] | None = None,
) -> str:
    """Write the report of these runs into ``folder``.

    wanted_of_sweep: {folder of a sweep: its run folders}. The report of a sweep has the paired
    comparison of the settings, and names the runs that are not done.
    The folder must be new, empty or hold an earlier report. Returns a line about what was written.
    Raises ValueError for a path that is no run, a run without rounds, a folder with other files, or
    if matplotlib or pandas is missing.
    """
    old_files = _earlier_files(folder)
    with plot_style():
        # the pattern runs/* may also match the report's folder
        logs = read_logs([path for path in paths if path.resolve() != folder.resolve()])
        content = collect_content(logs, wanted_of_sweep)
        files: dict[str, bytes] = {}
        svg_of: dict[str, bytes] = {}
        for figure, rendered in zip(content.figures, render_files(content.figures), strict=True):
            svg_of[figure.name] = rendered.pop("svg")
            files |= {f"{FIGURES}/{figure.name}.{kind}": file for kind, file in rendered.items()}
    for table in content.tables:
        for kind, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            files[f"{TABLES}/{table.name}.{kind}"] = text.encode()
    files[f"{TABLES}/rounds.csv"] = _csv_bytes(rounds_table(logs))
    files[f"{TABLES}/clients.csv"] = _csv_bytes(_final_clients(logs))
    page = render_page(content, svg_of, sorted(files)).encode()
    _write_files(folder, files | {PAGE: page}, old_files)
    counts = (
        f"{len(content.figures)} figures and {len(content.tables)} tables of "
        f"{format_counts([len(logs)], 'run')}"
    )
    written_note = f"PNG and PDF in {FIGURES}/, CSV, Markdown and LaTeX in {TABLES}/"
    return f"{folder / PAGE}: {counts}, {format_bytes(len(page))}; {written_note}"


def read_logs(paths: Sequence[Path]) -> list[RunLog]:
    """Read the log of each run once.

    Raises ValueError for a path that is no run, for a run without rounds, or without any path.
    """
    if not paths:
        raise ValueError("no run is left to report on; give the `output` of runs")
    logs = [RunLog.read(path) for path in {path.resolve(): path for path in paths}.values()]
    for run in logs:
        if not run.rounds_done:
            raise ValueError(f"{run.path}: has no round yet; leave it out, or wait for its first")
    return logs


def collect_content(
    logs: Sequence[RunLog], wanted_of_sweep: Mapping[Path, Sequence[Path]] | None = None
) -> PageContent:
    """Return the tables and figures for which the runs have data."""
    run_groups = group_runs(logs)
    groups = run_groups.groups
    look_of = assign_looks(groups)
    pairs, low_rank_figures = clients.rival_pairs(groups), personal.personal_figures(groups)
    on_grids, swept_keys = sweeps.grid_figures(groups, run_groups.keys)
    figures = [
        curves.learning_curves(groups, look_of),
        *curves.score_curves(groups, look_of),
        curves.client_spread(groups, look_of),
        clients.client_distribution(groups, look_of),
        clients.rival_scatter(pairs, look_of),
        *on_grids,
        *sweeps.sweep_figures(groups, run_groups.keys, swept_keys, look_of),
        curves.accuracy_by_bytes(groups, look_of),
        curves.accuracy_by_flops(groups, look_of),
        ranks.seconds_by_stage(groups, look_of),
        ranks.seconds_by_rank(groups, look_of),
        curves.loss_curves(groups, look_of),
        curves.drift_curves(groups, look_of),
        topology.consensus_curves(groups, look_of),
        topology.graph_figure(groups, look_of),
        *curves.diagnosis_curves(groups, look_of),
        *low_rank_figures.figures,
        *clients.partition_figures(groups),
    ]
    comparisons = compare_leaders(groups) if wanted_of_sweep else []
    missing = list(missing_runs_lines(wanted_of_sweep or {}, logs))
    candidates = [
        tables.accuracy_table(groups),
        tables.settings_table(run_groups),
        tables.comparison_table(comparisons),
        tables.rival_table(pairs),
        topology.topology_table(groups),
        tables.cost_table(groups),
        tables.time_table(groups),
        tables.low_rank_table(low_rank_figures.tables),
        tables.run_table(groups),
    ]
    notes = [
        *(f"{line}." for line in missing),
        *(
            f"{line[0].upper()}{line[1:]}."
            for line in winner_lines(comparisons, runs_are_missing=bool(missing))
        ),
        *_caution_notes(run_groups),
    ]
    if low_rank_figures.left_out:
        notes.append(
            "Low-rank and personal parts that are not shown: "
            f"{'; '.join(low_rank_figures.left_out)}."
        )
    renamed = [
        drawn._replace(name=escapes.safe_file_name(drawn.name)) for drawn in figures if drawn
    ]
    return PageContent(run_groups, [table for table in candidates if table], renamed, notes)


def render_page(content: PageContent, svg_of: dict[str, bytes], files: Sequence[str]) -> str:
    """Return the HTML page with the SVG of each figure.

    The page loads nothing from outside and has no scripts.
    """
    groups = content.run_groups.groups
    headline, *other_tables = content.tables
    sections = [(f"table-{headline.name}", headline.title, headline.html())]
    for figure in content.figures:
        picture = b64encode(svg_of[figure.name]).decode()
        image = (
            f'<img alt="{escapes.escape_html(figure.title)}" '
            f'src="data:image/svg+xml;base64,{picture}">'
        )
        size_inches = figure.figure.get_size_inches()
        caption = f"<figcaption>{escapes.escape_html(figure.caption)}</figcaption>"
        body = f'<figure style="max-width:{size_inches[0] * 1.25:.1f}in">{image}{caption}</figure>'
        sections.append(
            (
                f"figure-{figure.name}",
                figure.title,
                f"<h2>{escapes.escape_html(figure.title)}</h2>{body}",
            )
        )
    sections += [(f"table-{table.name}", table.title, table.html()) for table in other_tables]
    first_section: dict[str, str] = {}  # the contents link only to the first figure of a kind
    for name, title, _ in sections:
        first_section.setdefault(re.split(": |, split ", title)[0], name)
    contents = " · ".join(
        f'<a href="#{name}">{escapes.escape_html(title)}</a>'
        for title, name in first_section.items()
    )
    runs = format_counts([sum(len(group.runs) for group in groups)], "run")
    title = f"{runs}, {len(groups)} settings" if len(groups) > 1 else f"{groups[0].label}, {runs}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            _PAGE_MARK.format(escapes.escape_html(" ".join(files))),
            f"<title>{escapes.escape_html(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escapes.escape_html(title)}</h1>",
            f"<p>{escapes.escape_html(summarize(groups))} {_describe_size(groups)}</p>",
            *(f'<p class="note">{escapes.escape_html(note)}</p>' for note in content.notes),
            f"<nav>{contents}</nav>",
            *(f'<section id="{name}">{body}</section>' for name, _, body in sections),
            _common_settings(groups),
            f"<footer>Made by fedlora_mpi {__version__}, fedlora-mpi report. Figures are also in "
            f"{FIGURES}/, tables in {TABLES}/; tables/rounds.csv and tables/clients.csv hold the "
            "numbers of the curves.</footer>",
            "</body></html>",
            "",
        ]
    )


def _describe_size(groups: Sequence[Group]) -> str:
    """Return a sentence about the numbers of clients, seeds and rounds."""
    rounds = format_counts([run.rounds_done for group in groups for run in group.runs], "round")
    return f"{count_clients(groups)}, {count_seeds(groups)} per setting, {rounds}."


def summarize(groups: Sequence[Group]) -> str:
    """Return a sentence about the best group of each task."""
    sentences = []
    for task in dict.fromkeys(group.task for group in groups):
        finals = [
            (group.seed_stat(lambda run: run.final), group)
            for group in groups
            if group.task == task
        ]
        finals = sorted(
            (pair for pair in finals if pair[0].mean == pair[0].mean),
            key=lambda pair: -pair[0].mean,
        )
        task_note = f" ({task})" if task else ""
        if finals:
            sentences.append(_describe_lead(finals, task_note))
    if not sentences and any(run.scores for group in groups for run in group.runs):
        return "There is no accuracy, because the targets are no classes; compare the final scores."
    return " ".join(sentences) or "No round was evaluated yet."


def _describe_lead(finals: Sequence[tuple[Stat, Group]], task_note: str) -> str:
    """Return a sentence about the best group of a task and its lead over the second.

    finals: (final accuracy, group) of one task, the best first.
    """

    def format_stat(stat):
        return (
            f"{format_percent(stat.mean)}"
            + (f" ± {format_percent(stat.std)}" if stat.std == stat.std else "")
            + " %"
        )

    stat, leader = finals[0]
    seeds = f"{len(leader.runs)} seeds" if len(leader.runs) > 1 else "one seed"
    if len(finals) == 1:
        return (
            f"Final accuracy{task_note}, mean over clients: {leader.label} with "
            f"{format_stat(stat)} ({seeds})."
        )
    second_stat, runner_up = finals[1]
    lead = (
        f"{100 * (stat.mean - second_stat.mean):.2f} points above {runner_up.label} "
        f"({format_stat(second_stat)})"
    )
    return (
        f"Highest final accuracy{task_note}, mean over clients: {leader.label} with "
        f"{format_stat(stat)} ({seeds}), {lead}."
    )


def _caution_notes(run_groups: RunGroups) -> Iterator[str]:
    """Yield notes that a reader must know before comparing the groups."""
    for group in run_groups.groups:
        if len({run.rounds_done for run in group.runs}) > 1:
            rounds_text = ", ".join(str(run.rounds_done) for run in group.runs)
            yield (
                f"{group.label}: its seeds are at different rounds ({rounds_text}); "
                "curves end with the shortest."
            )
    unfinished = [
        f"{run.path} ({run.rounds_done} of {run.config['rounds']})"
        for g in run_groups.groups
        for run in g.runs
        if run.rounds_done < run.config["rounds"]
    ]
    if unfinished:
        yield f"Not done yet: {', '.join(unfinished)}."
    for dropped, representative in run_groups.left_out:
        yield f"{dropped.path} is left out: the same settings and seeds as {representative.path}."
    seeds = {len(group.runs) for group in run_groups.groups}
    if seeds == {1}:
        yield "One seed of each setting, so no standard deviation over seeds."


def _common_settings(groups: Sequence[Group]) -> str:
    """Return the settings that all runs share, as a folded HTML block."""
    settings_of_runs = [run.settings for group in groups for run in group.runs]
    common = {
        key: value
        for key, value in settings_of_runs[0].items()
        if all(settings.get(key, settings) == value for settings in settings_of_runs)
    }
    rows = "".join(
        f"<tr><td>{escapes.escape_html(key)}</td><td>{escapes.escape_html(format_setting(value))}</td></tr>"
        for key, value in common.items()
    )
    return (
        f"<details><summary>{len(common)} settings that all runs "
        f"share</summary><table>{rows}</table></details>"
    )


def _final_clients(logs: Sequence[RunLog]):
    """Return the table of all clients in the last evaluated round of each run."""
    table = clients_table(logs)
    return table[table["round"] == table.groupby("path")["round"].transform("max")]


def _csv_bytes(table) -> bytes:
    """Return a pandas table as CSV; texts are escaped so that a spreadsheet runs no formula."""
    texts = table.select_dtypes(exclude="number").columns
    safe = table.assign(**{name: table[name].map(escapes.csv_cell) for name in texts}).rename(
        columns=escapes.csv_cell
    )
    return safe.to_csv(index=False, lineterminator="\n").encode()


def _earlier_files(folder: Path) -> list[str]:
    """Return the files of an earlier report in ``folder``; none if the folder is new or empty.

    Raises ValueError for any other content.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder with -o")
    nolinks.check_entries(folder, {PAGE, f".{PAGE}.tmp"}.__contains__)
    for name in (FIGURES, TABLES):

        def is_report_file(file: str, name: str = name) -> bool:
            return _is_report_file(f"{name}/{file.removesuffix('.tmp')}")

        nolinks.check_entries(folder / name, is_report_file, folder)
    page_start = ""
    if os.path.lexists(page := folder / PAGE):
        with open_for_reading(page) as file:
            page_start = file.read(100_000).decode(errors="replace")
    if not (mark := re.search(_PAGE_MARK.format('([^"]*)'), page_start)):
        raise ValueError(
            f"{folder}: has other files and no report of ours; give a new folder with -o"
        )
    return [name for name in mark[1].split() if _is_report_file(name)]


def _is_report_file(name: str) -> bool:
    """Return whether a report writes files with such a name."""
    folder, _, file = name.partition("/")
    return (
        folder in _FILE_KINDS
        and check_plain_name(file) == file
        and file.rpartition(".")[2] in _FILE_KINDS[folder]
    )


def _write_files(folder: Path, files: dict[str, bytes], old_files: Sequence[str]) -> None:
    """Write the files, the page last, and then remove files that only the earlier report had.

    Raises ValueError if the folder cannot be written.
    """
    try:
        for name in (FIGURES, TABLES):
            with nolinks.open_folder(folder / name, folder, create=True):
                pass
        for name, content in files.items():
            write_atomic(folder / name, content, folder)
        for name in set(old_files) - set(files):
            nolinks.remove(folder / name, folder)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written: {error.strerror}; give another folder with -o"
        ) from error


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.1rem;margin:2.2rem 0 .4rem}
nav{font-size:.85rem;margin:1rem 0;color:#777}a{color:#0072b2;text-decoration:none}a:hover{text-decoration:underline}
figure{margin:0}img{width:100%;height:auto;display:block}
figcaption,caption,.note,footer{font-size:.9rem;color:#444}
caption{text-align:left;padding:0 0 .4rem}caption b{color:#1a1a1a}
.note{border-left:3px solid #d55e00;padding-left:.7rem}
.t{overflow-x:auto;margin:1.6rem 0}table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.22rem .55rem;text-align:left;vertical-align:top}th{vertical-align:bottom}th{border-bottom:1.5px solid #1a1a1a;font-weight:600}
thead th:first-child,td:first-child{padding-left:0}tr+tr td{border-top:1px solid #e4e4e4}
.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}
details{margin:2rem 0}summary{cursor:pointer}footer{margin:3rem 0 1rem;border-top:1px solid #e4e4e4;padding-top:.5rem}
@media print{body{font-size:10pt;max-width:none;margin:0}nav,details{display:none}h2{break-after:avoid}
figure,tr,section{break-inside:avoid}.t{overflow:visible}
img{max-height:85vh;object-fit:contain;object-position:left}}
"""  # noqa: E501
