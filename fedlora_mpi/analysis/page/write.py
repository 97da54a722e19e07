"""A folder with one self-contained page, its figures as PNG and PDF, its tables as CSV, Markdown
and LaTeX.
"""

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ... import __version__
from ...core import escapes
from ...core.units import size
from ...store import nolinks
from ...store.files import opened_file, plain_name, write_atomic
from ..groups import Found, Group, Logged, Stat, grouped, shown
from ..runs import of_all_clients, of_rounds
from . import clients, curves, personal, ranks, sweeps, tables
from .crowd import looks_of
from .style import Drawn, files_of, styled
from .table import Table, percent

PAGE, FIGURES, TABLES = "report.html", "figures", "tables"
_KINDS = {FIGURES: ("png", "pdf"), TABLES: ("csv", "md", "tex")}
_MARK = '<meta name="fedlora-mpi" content="{}">'  # of our pages: the names of the files beside them


class Content(NamedTuple):
    """What is told of the runs, in the order of the page."""

    found: Found
    tables: list[Table]
    figures: list[Drawn]
    notes: list[str]


def write(paths: Sequence[Path], folder: Path) -> str:
    """Write the report of these runs into ``folder``, new, empty or of an earlier report; what was
    done, in a line.

    Raises ValueError: a path that is no run, a run without rounds, a folder with other files, no
    matplotlib or pandas.
    """
    old = _earlier(folder)
    with styled():
        # runs/* may hold the report
        logs = read([path for path in paths if path.resolve() != folder.resolve()])
        content = gathered(logs)
        files, pictures = {}, {}
        for figure, made in zip(content.figures, files_of(content.figures), strict=True):
            pictures[figure.name] = made.pop("svg")
            files |= {f"{FIGURES}/{figure.name}.{kind}": file for kind, file in made.items()}
    for table in content.tables:
        for kind, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            files[f"{TABLES}/{table.name}.{kind}"] = text.encode()
    files[f"{TABLES}/rounds.csv"] = _csv(of_rounds(logs))
    files[f"{TABLES}/clients.csv"] = _csv(_last(logs))
    page = html(content, pictures, sorted(files)).encode()
    _put(folder, files | {PAGE: page}, old)
    counts = f"{len(content.figures)} figures and {len(content.tables)} tables of {len(logs)} runs"
    beside = f"PNG and PDF in {FIGURES}/, CSV, Markdown and LaTeX in {TABLES}/"
    return f"{folder / PAGE}: {counts}, {size(len(page))}; {beside}"


def read(paths: Sequence[Path]) -> list[Logged]:
    """The runs, each once. Raises ValueError for what is no run, or has no round yet."""
    if not paths:
        raise ValueError("no run is left to report on; give the `output` of runs")
    logs = [Logged.read(path) for path in {path.resolve(): path for path in paths}.values()]
    for run in logs:
        if not run.done:
            raise ValueError(f"{run.path}: has no round yet; leave it out, or wait for its first")
    return logs


def gathered(logs: Sequence[Logged]) -> Content:
    """The tables and figures for which the runs have the data."""
    found = grouped(logs)
    groups = found.groups
    look = looks_of(groups)
    pairs, parts = clients.pairs(groups), personal.personal(groups)
    on_grids, used = sweeps.grids(groups, found.keys)
    figures = [
        curves.learning(groups, look),
        curves.spread(groups, look),
        clients.distribution(groups, look),
        clients.against(pairs, look),
        *on_grids,
        *sweeps.sweeps(groups, found.keys, used),
        curves.against_bytes(groups, look),
        curves.against_flops(groups, look),
        curves.stages(groups, look),
        ranks.ranks(groups, look),
        curves.loss(groups, look),
        curves.drift(groups, look),
        *curves.diagnosis(groups, look),
        *parts.drawn,
        *clients.partitions(groups),
    ]
    maybe = [
        tables.accuracy(groups),
        tables.settings(found),
        tables.against(pairs),
        tables.costs(groups),
        tables.low_rank(parts.tables),
        tables.runs(groups),
    ]
    notes = list(_cautions(found))
    if parts.left_out:
        notes.append(
            f"Low-rank and personal parts that are not shown: {'; '.join(parts.left_out)}."
        )
    named = [drawn._replace(name=escapes.file_name(drawn.name)) for drawn in figures if drawn]
    return Content(found, [table for table in maybe if table], named, notes)


def html(content: Content, pictures: dict[str, bytes], files: Sequence[str]) -> str:
    """The page; ``pictures``: SVG of each figure, inside it. Nothing is fetched and nothing runs."""
    groups = content.found.groups
    headline, *others = content.tables
    sections = [(f"table-{headline.name}", headline.title, headline.html())]
    for figure in content.figures:
        picture = b64encode(pictures[figure.name]).decode()
        image = f'<img alt="{escapes.html_text(figure.title)}" src="data:image/svg+xml;base64,{picture}">'
        inches = figure.figure.get_size_inches()
        said = f"<figcaption>{escapes.html_text(figure.caption)}</figcaption>"
        body = f'<figure style="max-width:{inches[0] * 1.25:.1f}in">{image}{said}</figure>'
        sections.append(
            (
                f"figure-{figure.name}",
                figure.title,
                f"<h2>{escapes.html_text(figure.title)}</h2>{body}",
            )
        )
    sections += [(f"table-{table.name}", table.title, table.html()) for table in others]
    first: dict[str, str] = {}  # of several figures of a kind
    for name, title, _ in sections:
        first.setdefault(re.split(": |, split ", title)[0], name)
    contents = " · ".join(
        f'<a href="#{name}">{escapes.html_text(title)}</a>' for title, name in first.items()
    )
    runs = sum(len(group.runs) for group in groups)
    title = (
        f"{runs} runs, {len(groups)} settings"
        if len(groups) > 1
        else f"{groups[0].label}, {runs} runs"
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            _MARK.format(escapes.html_text(" ".join(files))),
            f"<title>{escapes.html_text(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escapes.html_text(title)}</h1>",
            f"<p>{escapes.html_text(summary(groups))}</p>",
            *(f'<p class="note">{escapes.html_text(note)}</p>' for note in content.notes),
            f"<nav>{contents}</nav>",
            *(f'<section id="{name}">{body}</section>' for name, _, body in sections),
            _common(groups),
            f"<footer>Made by fedlora_mpi {__version__}, fedlora-mpi report. Figures are also in {FIGURES}/, tables "
            f"in {TABLES}/; "
            "tables/rounds.csv and tables/clients.csv hold the numbers of the curves.</footer>",
            "</body></html>",
            "",
        ]
    )


def summary(groups: Sequence[Group]) -> str:
    """What is ahead, in a sentence for each task."""
    said = []
    for task in dict.fromkeys(group.task for group in groups):
        finals = [
            (group.over(lambda run: run.final), group) for group in groups if group.task == task
        ]
        finals = sorted(
            (pair for pair in finals if pair[0].mean == pair[0].mean),
            key=lambda pair: -pair[0].mean,
        )
        where = f" ({task})" if task else ""
        if finals:
            said.append(_ahead(finals, where))
    return " ".join(said) or "No round was evaluated yet."


def _ahead(finals: Sequence[tuple[Stat, Group]], where: str) -> str:
    """The first of those of one task, and how far it is before the second."""

    def tell(stat):
        return (
            f"{percent(stat.mean)}"
            + (f" ± {percent(stat.std)}" if stat.std == stat.std else "")
            + " %"
        )

    stat, top = finals[0]
    seeds = f"{len(top.runs)} seeds" if len(top.runs) > 1 else "one seed"
    if len(finals) == 1:
        return f"Final accuracy{where}, mean over clients: {top.label} with {tell(stat)} ({seeds})."
    second, other = finals[1]
    ahead = f"{100 * (stat.mean - second.mean):.2f} points above {other.label} ({tell(second)})"
    return f"Highest final accuracy{where}, mean over clients: {top.label} with {tell(stat)} ({seeds}), {ahead}."


def _cautions(found: Found) -> Iterator[str]:
    """What a reader must know before comparing."""
    for group in found.groups:
        if len({run.done for run in group.runs}) > 1:
            each = ", ".join(str(run.done) for run in group.runs)
            yield f"{group.label}: its seeds are at different rounds ({each}); curves end with the shortest."
    asked = [
        f"{run.path} ({run.done} of {run.config['rounds']})"
        for g in found.groups
        for run in g.runs
        if run.done < run.config["rounds"]
    ]
    if asked:
        yield f"Not done yet: {', '.join(asked)}."
    for gone, kept in found.left_out:
        yield f"{gone.path} is left out: the same settings and seeds as {kept.path}."
    seeds = {len(group.runs) for group in found.groups}
    if seeds == {1}:
        yield "One seed of each setting, so no standard deviation over seeds."


def _common(groups: Sequence[Group]) -> str:
    """The settings that all runs share, folded away."""
    every = [run.settings for group in groups for run in group.runs]
    same = {
        key: value
        for key, value in every[0].items()
        if all(of.get(key, of) == value for of in every)
    }
    rows = "".join(
        f"<tr><td>{escapes.html_text(key)}</td><td>{escapes.html_text(shown(value))}</td></tr>"
        for key, value in same.items()
    )
    return f"<details><summary>{len(same)} settings that all runs share</summary><table>{rows}</table></details>"


def _last(logs: Sequence[Logged]):
    """Each client in the last evaluated round of its run."""
    table = of_all_clients(logs)
    return table[table["round"] == table.groupby("path")["round"].transform("max")]


def _csv(table) -> bytes:
    """A table of pandas, in which no text is a formula."""
    texts = table.select_dtypes(exclude="number").columns
    safe = table.assign(**{name: table[name].map(escapes.cell) for name in texts}).rename(
        columns=escapes.cell
    )
    return safe.to_csv(index=False, lineterminator="\n").encode()


def _earlier(folder: Path) -> list[str]:
    """The files of an earlier report in ``folder``. Raises ValueError where it has other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder with -o")
    nolinks.check(folder, {PAGE, f".{PAGE}.tmp"}.__contains__)
    for name in (FIGURES, TABLES):

        def ours(file: str, name: str = name) -> bool:
            return _ours(f"{name}/{file.removesuffix('.tmp')}")

        nolinks.check(folder / name, ours, folder)
    head = ""
    if os.path.lexists(page := folder / PAGE):
        with opened_file(page) as file:
            head = file.read(100_000).decode(errors="replace")
    if not (found := re.search(_MARK.format('([^"]*)'), head)):
        raise ValueError(
            f"{folder}: has other files and no report of ours; give a new folder with -o"
        )
    return [name for name in found[1].split() if _ours(name)]


def _ours(name: str) -> bool:
    """Whether a report writes files of this name."""
    where, _, file = name.partition("/")
    return where in _KINDS and plain_name(file) == file and file.rpartition(".")[2] in _KINDS[where]


def _put(folder: Path, files: dict[str, bytes], old: Sequence[str]) -> None:
    """Write the files, the page last; then what only the earlier report had goes. Raises
    ValueError.
    """
    try:
        for name in (FIGURES, TABLES):
            with nolinks.opened_folder(folder / name, folder, make=True):
                pass
        for name, content in files.items():
            write_atomic(folder / name, content, folder)
        for name in set(old) - set(files):
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
th,td{padding:.22rem .7rem;text-align:left;vertical-align:top}th{border-bottom:1.5px solid #1a1a1a;font-weight:600}
thead th:first-child,td:first-child{padding-left:0}tr+tr td{border-top:1px solid #e4e4e4}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:2rem 0}summary{cursor:pointer}footer{margin:3rem 0 1rem;border-top:1px solid #e4e4e4;padding-top:.5rem}
@media print{body{font-size:10pt;max-width:none;margin:0}nav,details{display:none}h2{break-after:avoid}
figure,tr,section{break-inside:avoid}.t{overflow:visible}
img{max-height:85vh;object-fit:contain;object-position:left}}
"""
