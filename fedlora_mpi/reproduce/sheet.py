"""A table of results beside the paper's numbers: as text, as Markdown, as CSV."""

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..analysis.report import aligned
from ..core import escapes
from . import paper
from .grid import Entry, Table
from .paper import V
from .results import Result

METRIC = (
    "accuracy in %: mean over the clients of each client's own model on its own test data. best: "
    "in the best round, chosen on test data as in the paper; last: in the last round"
)

_DRIFT = (
    "drift: distance (L2) of the clients' sigma_i after training from their mean, over the "
    "parameters: the root of the mean square over clients, where the paper's eq. (9) has the mean"
)
_AS_GOOD = (
    "as good: clients whose accuracy with FedLoRA is at least that with the other method, each in "
    "its best round; worst difference: of any client to the better of the two, percentage points"
)


@dataclass(frozen=True)
class Sheet:
    """``rows``: the first is the header; ``records``: the same numbers unrounded, for the CSV.

    ``caution``: what sets the runs apart from the paper's, above the table.
    """

    title: str
    caution: str
    notes: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Any]]

    def text(self) -> str:
        """For a terminal."""

        def fill(text, first=""):
            return textwrap.fill(
                text, 100, initial_indent=first, subsequent_indent=" " * len(first)
            )

        head = [self.title, *([fill(self.caution)] if self.caution else [])]
        return "\n".join(
            [
                *head,
                "",
                aligned(self.rows, left=(0,)),
                "",
                *(fill(note, "- ") for note in self.notes),
            ]
        )

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        header, *rows = (
            "| " + " | ".join(escapes.markdown(cell.strip()) for cell in row) + " |"
            for row in self.rows
        )
        rule = "|---|" + "---:|" * (len(self.rows[0]) - 1)
        head = [f"### {self.title}", "", *([f"**{self.caution}**", ""] if self.caution else [])]
        return "\n".join(
            [*head, header, rule, *rows, "", *(f"- {note}" for note in self.notes), ""]
        )

    def csv(self) -> str:
        """A row a record; a number that is not known is empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, self.records[0], lineterminator="\n")
        writer.writeheader()

        def empty(value):
            return isinstance(value, float) and np.isnan(value)

        writer.writerows(
            {name: "" if empty(v) else escapes.cell(v) for name, v in row.items()}
            for row in self.records
        )
        return file.getvalue()


class Cell(NamedTuple):
    """One entry over the seeds, per cent; NaN where unknown."""

    entry: Entry
    done: int  # seeds
    best: V
    last: V

    @property
    def difference(self) -> float:
        """Ours less the paper's, in percentage points."""
        return self.best.mean - self.entry.published.mean if self.entry.published else np.nan

    @classmethod
    def of(cls, entry: Entry, results: Sequence[Result]) -> "Cell":
        """The mean of the finished runs, and their sample standard deviation."""
        return cls(
            entry, len(results), _over([r.best for r in results]), _over([r.last for r in results])
        )


def compare(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    papers: str = Table.papers,
) -> Sheet:
    """A row for each entry, beside the paper."""
    rows = [("", "seeds", "best", "last", "paper", "difference")]
    for cell in cells:
        numbers = [show(v) for v in (cell.best, cell.last, cell.entry.published)]
        rows.append((cell.entry.label, f"{cell.done}/{seeds}", *numbers, signed(cell.difference)))
    return Sheet(
        title,
        caution,
        [METRIC, spread(seeds, papers), *notes, *_order(cells)],
        rows,
        [record(c) for c in cells],
    )


def ranks(
    title: str, caution: str, notes: Sequence[str], cells: Sequence[Cell], seeds: int
) -> Sheet:
    """Table 2: R_l down, R_c across; in each cell ours and, in brackets, the difference. * is our
    best.
    """
    at = {(c.entry.algorithm["linear_rank"], c.entry.algorithm["conv_rank"]): c for c in cells}
    downs, acrosses = (sorted({place[axis] for place in at}) for axis in (0, 1))
    top = max((c.best.mean for c in cells if c.done), default=np.nan)
    rows = [("R_l \\ R_c", *(f"{r_c:.0%}" for r_c in acrosses))]
    for r_l in downs:
        row = [at.get((r_l, r_c)) for r_c in acrosses]
        marks = ["*" if cell and cell.best.mean == top else "" for cell in row]
        shown = [f"{show(c.best)} ({signed(c.difference)})" if c else "" for c in row]
        rows.append((f"{r_l:.0%}", *(text + mark for text, mark in zip(shown, marks, strict=True))))
    said = "best accuracy, in brackets the difference to the paper; * our highest"
    return Sheet(
        title,
        caution,
        [said, METRIC, spread(seeds), *notes, *_order(cells)],
        rows,
        [record(c) for c in cells],
    )


def drift(
    title: str, caution: str, notes: Sequence[str], results: Mapping[str, Sequence[Result]]
) -> Sheet:
    """Figure 6: rounds down, the orders of training across, means over seeds."""
    curves = {label: drift_of(found) for label, found in results.items() if found}
    length = min((len(curve) for curve in curves.values()), default=0)
    shown = sorted({*range(0, length, max(1, length // 10)), length - 1} - {-1})
    rows = [("round", *curves)]
    rows += [(str(t + 1), *(f"{curve[t]:.4g}" for curve in curves.values())) for t in shown]
    records = [
        {"round": t + 1} | {label: curve[t] for label, curve in curves.items()}
        for t in range(length)
    ]
    said = [_DRIFT, f"the paper: {paper.CLAIMS['fig6']}"]
    if {"alternating", "simultaneous"} <= curves.keys() and length:
        ratio = curves["alternating"][:length] / curves["simultaneous"][:length]
        below = np.count_nonzero(ratio < 1)
        said.append(
            f"here: alternating is below in {below} of {length} rounds, {ratio.mean():.2f} times "
            "on average"
        )
    return Sheet(title, caution, [*said, *notes], rows, records or [{"round": None}])


def each_client(
    title: str, caution: str, notes: Sequence[str], results: Mapping[str, Sequence[Result]]
) -> Sheet:
    """Figure 7: how many clients FedLoRA serves at least as well as FedAvg and Local, a row for
    each seed.
    """
    rows = [
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
    for seed, columns in by_client(results).items():
        ours, others = columns["fedlora"], [columns["fedavg"], columns["local"]]
        good = [np.count_nonzero(ours >= other) for other in (*others, np.maximum(*others))]
        worst = signed((ours - np.maximum(*others)).min())
        rows.append((str(seed), str(len(ours)), *map(str, good), worst))
        for client, numbers in enumerate(zip(*columns.values(), strict=True)):
            records.append(
                {"seed": seed, "client": client} | dict(zip(columns, numbers, strict=True))
            )
    said = [_AS_GOOD, f"the paper: {paper.CLAIMS['fig7']}"]
    return Sheet(title, caution, [*said, *notes], rows, records or [{"seed": None, "client": None}])


def drift_of(results: Sequence[Result]) -> np.ndarray:
    """[T] mean over seeds."""
    return np.mean([result.rounds["drift"] for result in results], axis=0)


def by_client(
    results: Mapping[str, Sequence[Result]], keys: Sequence[str] = ("fedlora", "fedavg", "local")
) -> dict[int, dict[str, np.ndarray]]:
    """seed -> method -> [N] accuracy in its best round, per cent; only seeds that all ``keys``
    have.
    """
    found: dict[int, dict[str, np.ndarray]] = {}
    for key in keys:
        for result in results.get(key, ()):
            column = 100 * result.clients["accuracy"][result.best_row]
            found.setdefault(result.job.seed, {})[key] = column
    return {seed: columns for seed, columns in sorted(found.items()) if len(columns) == len(keys)}


def _over(numbers: Sequence[float]) -> V:
    if not numbers:
        return V(np.nan, np.nan)
    return V(
        float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else np.nan
    )


def show(value: V | None) -> str:
    """Mean and deviation; "-" where unknown."""
    if value is None or np.isnan(value.mean):
        return "-"
    return f"{value.mean:.2f}" + ("" if np.isnan(value.std) else f" ± {value.std:.2f}")


def signed(number: float) -> str:
    """A difference; "-" where unknown."""
    return "-" if np.isnan(number) else f"{number:+.2f}"


def spread(seeds: int, papers: str = Table.papers) -> str:
    """What stands behind ±; ``papers``: what is known of the paper's."""
    if seeds == 1:
        return f"one seed, so no standard deviation; {papers}"
    return f"± sample standard deviation over {seeds} seeds (of run and partition); {papers}"


def record(cell: Cell) -> dict[str, Any]:
    """The cell as columns of a CSV."""
    published = cell.entry.published or V(np.nan, np.nan)
    pairs = {"best": cell.best, "last": cell.last, "paper": published}
    numbers = {
        f"{name}_{part}": getattr(v, part) for name, v in pairs.items() for part in ("mean", "std")
    }
    return {
        "entry": cell.entry.key,
        "label": cell.entry.label,
        "seeds": cell.done,
        **numbers,
        "difference": cell.difference,
    }


def _order(cells: Sequence[Cell]) -> Iterator[str]:
    """Whether the entries come in the paper's order, where there are enough of them to say so."""
    pairs = [(c.best.mean, c.entry.published.mean) for c in cells if c.done and c.entry.published]
    if len(pairs) > 3:
        places = [np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True)]
        rho = np.corrcoef(*places)[0, 1]
        yield (
            f"order of the {len(pairs)} entries against the paper's: rank correlation {rho:+.2f} "
            "(Spearman; 1 is the same)"
        )
