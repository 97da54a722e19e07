"""A table of results beside the paper's numbers, as text, Markdown or CSV."""

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..analysis.report import align_columns
from ..core import escapes
from . import paper
from .grid import Entry, Table
from .order import order_notes
from .paper import Accuracy
from .results import Result

METRIC_NOTE = (
    "accuracy in %: mean over the clients of each client's own model on its own test data. best: "
    "in the best round, chosen on test data as in the paper; last: in the last round"
)

_DRIFT_NOTE = (
    "drift: distance (L2) of the clients' sigma_i after training from their mean, over the "
    "parameters: the root of the mean square over clients, where the paper's eq. (9) has the mean"
)
_AS_GOOD_NOTE = (
    "as good: clients whose accuracy with FedLoRA is at least that with the other method, each in "
    "its best round; worst difference: of any client to the better of the two, percentage points"
)


@dataclass(frozen=True)
class Sheet:
    """The content of a table. The first of ``rows`` is the header. ``records`` has the same numbers
    unrounded, for the CSV. ``caution`` says above the table how the runs differ from the paper's.
    """

    title: str
    caution: str
    notes: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Any]]

    def text(self) -> str:
        """The table as text for a terminal."""

        def fill(text, bullet=""):
            return textwrap.fill(
                text, 100, initial_indent=bullet, subsequent_indent=" " * len(bullet)
            )

        header_lines = [self.title, *([fill(self.caution)] if self.caution else [])]
        return "\n".join(
            [
                *header_lines,
                "",
                align_columns(self.rows, left=(0,)),
                "",
                *(fill(note, "- ") for note in self.notes),
            ]
        )

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        header, *rows = (
            "| " + " | ".join(escapes.escape_markdown(cell.strip()) for cell in row) + " |"
            for row in self.rows
        )
        separator = "|---|" + "---:|" * (len(self.rows[0]) - 1)
        header_lines = [
            f"### {self.title}",
            "",
            *([f"**{self.caution}**", ""] if self.caution else []),
        ]
        return "\n".join(
            [*header_lines, header, separator, *rows, "", *(f"- {note}" for note in self.notes), ""]
        )

    def csv(self) -> str:
        """The table as CSV: one row per record. Unknown numbers are empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, self.records[0], lineterminator="\n")
        writer.writeheader()

        def is_unknown(value):
            return isinstance(value, float) and np.isnan(value)

        writer.writerows(
            {name: "" if is_unknown(v) else escapes.csv_cell(v) for name, v in row.items()}
            for row in self.records
        )
        return file.getvalue()


class Cell(NamedTuple):
    """The results of one entry over the seeds, in per cent. NaN where unknown."""

    entry: Entry
    num_seeds: int  # finished seeds
    best: Accuracy
    last: Accuracy
    best_by_seed: Mapping[int, float] = {}

    @property
    def difference(self) -> float:
        """Our best accuracy minus the paper's, in percentage points."""
        return self.best.mean - self.entry.published.mean if self.entry.published else np.nan

    @classmethod
    def from_results(cls, entry: Entry, results: Sequence[Result]) -> "Cell":
        """The mean of the finished runs and their sample standard deviation."""
        return cls(
            entry,
            len(results),
            seed_stat([r.best for r in results]),
            seed_stat([r.last for r in results]),
            {r.job.seed: r.best for r in results},
        )


def comparison_sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    std_note: str = Table.std_note,
) -> Sheet:
    """A row for each entry: our accuracy beside the paper's."""
    rows: list[tuple[str, ...]] = [("", "seeds", "best", "last", "paper", "difference")]
    for cell in cells:
        numbers = [format_accuracy(v) for v in (cell.best, cell.last, cell.entry.published)]
        rows.append(
            (
                cell.entry.label,
                f"{cell.num_seeds}/{seeds}",
                *numbers,
                format_difference(cell.difference),
            )
        )
    return Sheet(
        title,
        caution,
        [METRIC_NOTE, spread_note(seeds, std_note), *notes, *order_notes(cells)],
        rows,
        [csv_record(c) for c in cells],
    )


def lora_rank_sheet(
    title: str, caution: str, notes: Sequence[str], cells: Sequence[Cell], seeds: int
) -> Sheet:
    """Table 2: a row for each R_l, a column for each R_c. Each cell has our accuracy and, in
    brackets, the difference to the paper. * marks our best.
    """
    cell_at = {(c.entry.algorithm["linear_rank"], c.entry.algorithm["conv_rank"]): c for c in cells}
    linear_ranks, conv_ranks = (
        sorted({rank_pair[axis] for rank_pair in cell_at}) for axis in (0, 1)
    )
    best_mean = max((c.best.mean for c in cells if c.num_seeds), default=np.nan)
    rows = [("R_l \\ R_c", *(f"{r_c:.0%}" for r_c in conv_ranks))]
    for r_l in linear_ranks:
        row = [cell_at.get((r_l, r_c)) for r_c in conv_ranks]
        marks = ["*" if cell and cell.best.mean == best_mean else "" for cell in row]
        texts = [
            f"{format_accuracy(c.best)} ({format_difference(c.difference)})" if c else ""
            for c in row
        ]
        rows.append((f"{r_l:.0%}", *(text + mark for text, mark in zip(texts, marks, strict=True))))
    explanation = "best accuracy, in brackets the difference to the paper; * our highest"
    return Sheet(
        title,
        caution,
        [explanation, METRIC_NOTE, spread_note(seeds), *notes, *order_notes(cells)],
        rows,
        [csv_record(c) for c in cells],
    )


def drift_sheet(
    title: str, caution: str, notes: Sequence[str], results: Mapping[str, Sequence[Result]]
) -> Sheet:
    """Figure 6: a row for each round shown, a column for each training order; means over seeds."""
    curves = {label: mean_drift(seeds) for label, seeds in results.items() if seeds}
    length = min((len(curve) for curve in curves.values()), default=0)
    shown_rounds = sorted({*range(0, length, max(1, length // 10)), length - 1} - {-1})
    rows = [("round", *curves)]
    rows += [(str(t + 1), *(f"{curve[t]:.4g}" for curve in curves.values())) for t in shown_rounds]
    records = [
        {"round": t + 1} | {label: curve[t] for label, curve in curves.items()}
        for t in range(length)
    ]
    explanations = [_DRIFT_NOTE, f"the paper: {paper.CLAIMS['fig6']}"]
    if {"alternating", "simultaneous"} <= curves.keys() and length:
        ratio = curves["alternating"][:length] / curves["simultaneous"][:length]
        num_below = np.count_nonzero(ratio < 1)
        explanations.append(
            f"here: alternating is below in {num_below} of {length} rounds, {ratio.mean():.2f} "
            "times on average"
        )
    return Sheet(title, caution, [*explanations, *notes], rows, records or [{"round": None}])


def client_sheet(
    title: str, caution: str, notes: Sequence[str], results: Mapping[str, Sequence[Result]]
) -> Sheet:
    """Figure 7: for each seed, how many clients FedLoRA serves at least as well as FedAvg and
    Local.
    """
    rows: list[tuple[str, ...]] = [
        (
            "seed",
            "clients",
            "as good as FedAvg",
            "as good as Local",
            "as good as both",
            "worst difference",
        )
    ]
    records = []
    for seed, columns in accuracy_by_client(results).items():
        ours, baselines = columns["fedlora"], [columns["fedavg"], columns["local"]]
        num_as_good = [
            np.count_nonzero(ours >= baseline) for baseline in (*baselines, np.maximum(*baselines))
        ]
        worst_difference = format_difference((ours - np.maximum(*baselines)).min())
        rows.append((str(seed), str(len(ours)), *map(str, num_as_good), worst_difference))
        for client, numbers in enumerate(zip(*columns.values(), strict=True)):
            records.append(
                {"seed": seed, "client": client} | dict(zip(columns, numbers, strict=True))
            )
    explanations = [_AS_GOOD_NOTE, f"the paper: {paper.CLAIMS['fig7']}"]
    return Sheet(
        title, caution, [*explanations, *notes], rows, records or [{"seed": None, "client": None}]
    )


def mean_drift(results: Sequence[Result]) -> np.ndarray:
    """The drift after each round, [T], the mean over seeds."""
    return np.mean([result.rounds["drift"] for result in results], axis=0)


def accuracy_by_client(
    results: Mapping[str, Sequence[Result]], keys: Sequence[str] = ("fedlora", "fedavg", "local")
) -> dict[int, dict[str, np.ndarray]]:
    """The accuracy of each client in the run's best round: seed -> method -> [N], per cent.

    Only seeds for which all ``keys`` have results are included.
    """
    accuracy_of: dict[int, dict[str, np.ndarray]] = {}
    for key in keys:
        for result in results.get(key, ()):
            column = 100 * result.clients["accuracy"][result.best_row]
            accuracy_of.setdefault(result.job.seed, {})[key] = column
    return {
        seed: columns for seed, columns in sorted(accuracy_of.items()) if len(columns) == len(keys)
    }


def seed_stat(numbers: Sequence[float]) -> Accuracy:
    """The mean over seeds and the sample standard deviation, NaN where there is none."""
    if not numbers:
        return Accuracy(np.nan, np.nan)
    return Accuracy(
        float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else np.nan
    )


def format_accuracy(value: Accuracy | None) -> str:
    """Mean and standard deviation as text; "-" where unknown."""
    if value is None or np.isnan(value.mean):
        return "-"
    return f"{value.mean:.2f}" + ("" if np.isnan(value.std) else f" ± {value.std:.2f}")


def format_difference(number: float) -> str:
    """A difference with its sign as text; "-" where unknown."""
    return "-" if np.isnan(number) else f"{number:+.2f}"


def spread_note(seeds: int, std_note: str = Table.std_note) -> str:
    """A note that explains ±. ``std_note`` says what is known of the paper's ±."""
    if seeds == 1:
        return f"one seed, so no standard deviation; {std_note}"
    return f"± sample standard deviation over {seeds} seeds (of run and partition); {std_note}"


def csv_record(cell: Cell) -> dict[str, Any]:
    """The cell as columns of a CSV."""
    published = cell.entry.published or Accuracy(np.nan, np.nan)
    pairs = {"best": cell.best, "last": cell.last, "paper": published}
    numbers = {
        f"{name}_{part}": getattr(v, part) for name, v in pairs.items() for part in ("mean", "std")
    }
    return {
        "entry": cell.entry.key,
        "label": cell.entry.label,
        "seeds": cell.num_seeds,
        **numbers,
        "difference": cell.difference,
    }
