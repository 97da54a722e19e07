"""A table once, as CSV, Markdown, LaTeX and HTML."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...core import escapes
from ..groups import Stat


class Column(NamedTuple):
    """``key``: in the CSV; ``title``: for people, with the unit; ``text``: of a number; ``best``:
    of a column where the highest mean is shown bold, of the rows with the same ``task`` (no column,
    or one that is not shown).
    """

    key: str
    title: str
    text: Callable[[Any], str] = str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """``rows``: cells by the keys of the columns: text, a number, a ``Stat`` or None where unknown."""

    name: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def csv(self) -> str:
        """Numbers unrounded; a Stat is two columns; what is unknown is empty."""
        file = io.StringIO()
        records = [dict(self._record(row)) for row in self.rows]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(escapes.cell, records[0]))
        writer.writerows(
            ["" if _unknown(v) else escapes.cell(v) for v in record.values()] for record in records
        )
        return file.getvalue()

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""

        def line(cells):
            return "| " + " | ".join(map(escapes.markdown, cells)) + " |"

        rule = "|" + "|".join("---" if left else "---:" for left in self._left) + "|"
        rows = [line(f"**{t}**" if bold else t for t, bold in row) for row in self._cells()]
        head = [
            f"### {escapes.markdown(self.title)}",
            "",
            line(column.title for column in self.columns),
            rule,
        ]
        return "\n".join([*head, *rows, "", escapes.markdown(self.note), ""])

    def latex(self) -> str:
        """A tabular for the package booktabs."""

        def line(cells):
            return " & ".join(cells) + r" \\"

        rows = [
            line(rf"\textbf{{{escapes.tex(t)}}}" if bold else escapes.tex(t) for t, bold in row)
            for row in self._cells()
        ]
        sides = "".join("l" if left else "r" for left in self._left)
        head = [
            escapes.one_line(f"% {self.title}. {self.note}"),
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
        ]
        titles = line(escapes.tex(column.title) for column in self.columns)
        return "\n".join([*head, titles, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])

    def html(self) -> str:
        """A table with its caption."""
        kinds = ["" if left else ' class="n"' for left in self._left]

        def line(tag, cells):
            return "".join(
                f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
            )

        rows = [
            line(
                "td",
                (
                    f"<b>{escapes.html_text(t)}</b>" if bold else escapes.html_text(t)
                    for t, bold in row
                ),
            )
            for row in self._cells()
        ]
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        head = line("th", (escapes.html_text(column.title) for column in self.columns))
        caption = f"<caption><b>{escapes.html_text(self.title)}.</b> {escapes.html_text(self.note)}</caption>"
        return f'<div class="t"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'

    @property
    def _left(self) -> list[bool]:
        """Whether a column is text, some cell of which does not begin as a number does."""

        def words(cell):
            return isinstance(cell, str) and not cell[:1].isdigit()

        return [any(words(row.get(column.key)) for row in self.rows) for column in self.columns]

    def _cells(self) -> list[list[tuple[str, bool]]]:
        """Of each row the texts, and whether they are the best of their column."""
        texts = [
            [_text(column, row.get(column.key)) for column in self.columns] for row in self.rows
        ]
        tasks = np.array([row.get("task", "") for row in self.rows])
        for at, column in enumerate(self.columns):
            means = np.array(
                [_mean(row.get(column.key)) if column.best else np.nan for row in self.rows]
            )
            for row, mean in enumerate(means):
                rivals = means[(tasks == tasks[row]) & ~np.isnan(means)]
                bold = (
                    len(rivals) > 1
                    and not np.isnan(mean)
                    and column.text(mean) == column.text(rivals.max())
                )
                texts[row][at] = (texts[row][at], bold)
        return texts

    def _record(self, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The cells of a row of the CSV."""
        for column in self.columns:
            value = row.get(column.key)
            if any(isinstance(other.get(column.key), Stat) for other in self.rows):
                value = value or Stat(np.nan, np.nan)
                yield from (
                    (f"{column.key}_{part}", number) for part, number in value._asdict().items()
                )
            else:
                yield column.key, value


def percent(fraction: float) -> str:
    """Two decimals, without the sign."""
    return f"{100 * fraction:.2f}"


def plain(number: float) -> str:
    """Three digits; no exponent for what people read as a whole number."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _text(column: Column, value: Any) -> str:
    if isinstance(value, Stat) and not _unknown(value.mean):
        return column.text(value.mean) + (
            "" if np.isnan(value.std) else f" ± {column.text(value.std)}"
        )
    if _unknown(value) or isinstance(value, Stat):
        return "-"
    return value if isinstance(value, str) else column.text(value)


def _mean(value: Any) -> float:
    value = value.mean if isinstance(value, Stat) else value
    return np.nan if value is None or isinstance(value, str) else float(value)


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
