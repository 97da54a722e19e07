"""Describe a table once and write it as CSV, Markdown, LaTeX and HTML."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...core import escapes
from ..groups import Stat


class Column(NamedTuple):
    """A column of a table.

    key: its name in the CSV. title: its readable name, with the unit. format_value: returns the
    text of a number. marks_best: whether the highest mean is bold, among the rows with the same
    ``task`` (a cell that need not be a column).
    """

    key: str
    title: str
    format_value: Callable[[Any], str] = str
    marks_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    rows: {column key: cell}. A cell is text, a number, a ``Stat``, or None if unknown.
    """

    name: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def csv(self) -> str:
        """Return the table as CSV: unrounded numbers, two columns per Stat, unknown cells empty."""
        file = io.StringIO()
        records = [dict(self._csv_cells(row)) for row in self.rows]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(escapes.csv_cell, records[0]))
        writer.writerows(
            ["" if _is_unknown(v) else escapes.csv_cell(v) for v in record.values()]
            for record in records
        )
        return file.getvalue()

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""

        def format_row(cells):
            return "| " + " | ".join(map(escapes.escape_markdown, cells)) + " |"

        separator = (
            "|" + "|".join("---" if left else "---:" for left in self._is_left_aligned) + "|"
        )
        rows = [
            format_row(f"**{t}**" if bold else t for t, bold in row)
            for row in self._formatted_cells()
        ]
        header = [
            f"### {escapes.escape_markdown(self.title)}",
            "",
            format_row(column.title for column in self.columns),
            separator,
        ]
        return "\n".join([*header, *rows, "", escapes.escape_markdown(self.note), ""])

    def latex(self) -> str:
        """Return a LaTeX tabular for the package booktabs."""

        def format_row(cells):
            return " & ".join(cells) + r" \\"

        rows = [
            format_row(
                rf"\textbf{{{escapes.escape_tex(t)}}}" if bold else escapes.escape_tex(t)
                for t, bold in row
            )
            for row in self._formatted_cells()
        ]
        alignment = "".join("l" if left else "r" for left in self._is_left_aligned)
        header = [
            escapes.escape_line(f"% {self.title}. {self.note}"),
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
        ]
        titles = format_row(escapes.escape_tex(column.title) for column in self.columns)
        return "\n".join(
            [*header, titles, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""]
        )

    def html(self) -> str:
        """Return an HTML table with its caption."""
        kinds = ["" if left else ' class="n"' for left in self._is_left_aligned]

        def format_row(tag, cells):
            return "".join(
                f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
            )

        rows = [
            format_row(
                "td",
                (
                    f"<b>{escapes.escape_html(t)}</b>" if bold else escapes.escape_html(t)
                    for t, bold in row
                ),
            )
            for row in self._formatted_cells()
        ]
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        header = format_row("th", (escapes.escape_html(column.title) for column in self.columns))
        caption = (
            f"<caption><b>{escapes.escape_html(self.title)}.</b> "
            f"{escapes.escape_html(self.note)}</caption>"
        )
        return (
            f'<div class="t"><table>{caption}<thead><tr>{header}</tr></thead><tbody>\n'
            f"{body}</tbody></table></div>"
        )

    @property
    def _is_left_aligned(self) -> list[bool]:
        """Whether each column is aligned left: it has a text cell that starts with no digit."""

        def is_text(cell):
            return isinstance(cell, str) and not cell[:1].isdigit()

        return [any(is_text(row.get(column.key)) for row in self.rows) for column in self.columns]

    def _formatted_cells(self) -> list[list[tuple[str, bool]]]:
        """Return (text, whether it is the best of its column) of each cell, row by row."""
        cells = [
            [(_format_cell(column, row.get(column.key)), False) for column in self.columns]
            for row in self.rows
        ]
        tasks = np.array([row.get("task", "") for row in self.rows])
        for index, column in enumerate(self.columns):
            means = np.array(
                [
                    _mean_value(row.get(column.key)) if column.marks_best else np.nan
                    for row in self.rows
                ]
            )
            for row, mean in enumerate(means):
                rivals = means[(tasks == tasks[row]) & ~np.isnan(means)]
                bold = (
                    len(rivals) > 1
                    and not np.isnan(mean)
                    and column.format_value(mean) == column.format_value(rivals.max())
                )
                cells[row][index] = (cells[row][index][0], bold)
        return cells

    def _csv_cells(self, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield (column name, value) of the CSV cells of a row."""
        for column in self.columns:
            value = row.get(column.key)
            if any(isinstance(other_row.get(column.key), Stat) for other_row in self.rows):
                value = value or Stat(np.nan, np.nan)
                yield from (
                    (f"{column.key}_{part}", number) for part, number in value._asdict().items()
                )
            else:
                yield column.key, value


def format_percent(fraction: float) -> str:
    """Return a fraction as a percentage with two decimals, without the percent sign."""
    return f"{100 * fraction:.2f}"


def format_number(number: float) -> str:
    """Return a number with three digits; from 1000 on as a whole number, without an exponent."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _format_cell(column: Column, value: Any) -> str:
    if isinstance(value, Stat) and not _is_unknown(value.mean):
        return column.format_value(value.mean) + (
            "" if np.isnan(value.std) else f" ± {column.format_value(value.std)}"
        )
    if _is_unknown(value) or isinstance(value, Stat):
        return "-"
    return value if isinstance(value, str) else column.format_value(value)


def _mean_value(value: Any) -> float:
    value = value.mean if isinstance(value, Stat) else value
    return np.nan if value is None or isinstance(value, str) else float(value)


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
