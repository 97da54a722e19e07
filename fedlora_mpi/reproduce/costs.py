"""What a method has spent when its accuracy first reaches a target, and who is ahead: the pFedLoRA
paper's tables.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .paper import PFEDLORA
from .pfedlora_table import OURS
from .results import Result
from .sheet import METRIC, Cell, Sheet, by_client, record, show, signed, spread

# percentage points below the best method: such a method does not lower the common target
FAILS = 10.0
UNITS = {"rounds": (1.0, "rounds"), "bytes": (1e6, "MB"), "flops": (1e12, "TFLOP")}
_NO_TABLES = "the paper's tables could not be had, only its claims"
Results = Mapping[str, Sequence[Result]]  # key of the entry -> finished seeds


class Spent(NamedTuple):
    """Of all clients together: rounds, bytes up and down, training FLOPs; NaN where unknown."""

    rounds: float
    bytes: float
    flops: float


class Curve(NamedTuple):
    """After each round, [T]: accuracy in per cent, and what was spent up to there."""

    accuracy: np.ndarray
    rounds: np.ndarray
    bytes: np.ndarray
    flops: np.ndarray

    @classmethod
    def of(cls, result: Result) -> "Curve":
        """That of one run."""
        column = result.rounds
        traffic = np.cumsum(column["bytes_up"] + column["bytes_down"])
        return cls(100 * column["accuracy"], column["round"], traffic, np.cumsum(column["flops"]))

    @classmethod
    def mean(cls, results: Sequence[Result]) -> "Curve":
        """The mean over seeds."""
        return cls(
            *(np.mean(columns, axis=0) for columns in zip(*map(cls.of, results), strict=True))
        )

    def until(self, target: float) -> Spent:
        """What is spent at the end of the first round whose accuracy is at least ``target``."""
        there = np.flatnonzero(self.accuracy >= target)
        return Spent(*(float(column[there[0]]) if len(there) else np.nan for column in self[1:]))


def until(results: Sequence[Result], target: float) -> Spent:
    """The mean over seeds; NaN unless every seed reaches the target."""
    each = [Curve.of(result).until(target) for result in results]
    return Spent(*np.mean(each, axis=0)) if each else Spent(np.nan, np.nan, np.nan)


def common(results: Results) -> tuple[float, list[str]]:
    """(the highest accuracy that every method reaches with every seed, the methods that it leaves
    out).

    Per cent, rounded down to two decimals. Left out are those whose best stays more than ``FAILS``
    below that of the best method, mean over seeds. NaN where there are no results.
    """
    best = {
        key: np.mean([result.best for result in found]) for key, found in results.items() if found
    }
    floor = max(best.values(), default=np.nan) - FAILS
    failed = [key for key, value in best.items() if value < floor]
    lowest = min(
        (r.best for key in best if key not in failed for r in results[key]), default=np.nan
    )
    return float(np.floor(100 * lowest) / 100), failed


def best_baseline(cells: Sequence[Cell]) -> Cell | None:
    """The most accurate method but ours."""
    others = [cell for cell in cells if cell.done and cell.entry.key != OURS]
    return max(others, key=lambda cell: cell.best.mean, default=None)


def accuracy(
    title: str, caution: str, notes: Sequence[str], cells: Sequence[Cell], seeds: int
) -> Sheet:
    """A row for each method: best and last accuracy, and how far ours is ahead."""
    ours, rival = _ours(cells), best_baseline(cells)

    def lead(cell):
        return ours.best.mean - cell.best.mean if ours and cell else np.nan

    rows = [("", "seeds", "best", "last", f"{OURS} ahead by")]
    for cell in cells:
        ahead = "" if cell is ours else signed(lead(cell))
        rows.append(
            (cell.entry.label, f"{cell.done}/{seeds}", show(cell.best), show(cell.last), ahead)
        )
    against = f" ({rival.entry.label})" if rival else ""
    claim = (
        f"ahead of the best baseline: the paper {PFEDLORA['accuracy']:+}, here "
        f"{signed(lead(rival))}{against}"
    )
    records = [record(cell) | {"ahead": lead(cell)} for cell in cells]
    return Sheet(title, caution, [claim, METRIC, spread(seeds, _NO_TABLES), *notes], rows, records)


def target(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    results: Results,
    percent: float,
) -> Sheet:
    """A row for each method: what it has spent when it reaches so many per cent, and its ratio to
    ours.
    """
    spent = {cell.entry.key: until(results[cell.entry.key], percent) for cell in cells}
    unknown = Spent(np.nan, np.nan, np.nan)

    def ratio(key):
        return _ratios(spent[key], spent.get(OURS, unknown))

    rows = [("", *(unit for _, unit in UNITS.values()), *(f"{name} / {OURS}" for name in UNITS))]
    records = []
    for cell in cells:
        mine, times = spent[cell.entry.key], ratio(cell.entry.key)
        shown = [_number(n / unit) for n, (unit, _) in zip(mine, UNITS.values(), strict=True)]
        rows.append((cell.entry.label, *shown, *map(_number, times)))
        ratios = {f"{name}_ratio": n for name, n in times._asdict().items()}
        records.append({"entry": cell.entry.key, "target": percent} | mine._asdict() | ratios)
    said = (
        "until the accuracy first reaches the target, all clients together: bytes sent up and "
        "down (float32), FLOPs "
    )
    said += "of local training; mean over seeds; -: some seed does not reach it"
    rivals = {cell.entry.key: cell.entry.label for cell in (best_baseline(cells),) if cell}
    rivals |= {cell.entry.key: cell.entry.label for cell in cells if cell.entry.key == "fedproto"}
    here = [
        f"{label} takes {_number(ratio(k).flops)} and {_number(ratio(k).bytes)} times"
        for k, label in rivals.items()
    ]
    claim = (
        f"computation and communication against the best baseline: the paper {PFEDLORA['flops']} "
        "and "
    )
    claim += f"{PFEDLORA['bytes']} times less (it names FedProto); here {', '.join(here) or '-'}"
    what = "no run yet" if np.isnan(percent) else f"{percent:g} %"
    return Sheet(f"{title}; cost of {what}", caution, [claim, said, *notes], rows, records)


def each_client(
    title: str, caution: str, notes: Sequence[str], cells: Sequence[Cell], results: Results
) -> Sheet:
    """A row for each seed: ours less the best baseline, client by client."""
    rows = [("seed", "clients", "better", "equal", "worse", "mean", "highest", "lowest")]
    records = []
    for seed, gap_N in differences(cells, results).items():
        counts = (np.count_nonzero(side) for side in (gap_N > 0, gap_N == 0, gap_N < 0))
        numbers = map(signed, (gap_N.mean(), gap_N.max(), gap_N.min()))
        rows.append((str(seed), str(len(gap_N)), *map(str, counts), *numbers))
        records += [
            {"seed": seed, "client": client, "difference": gap} for client, gap in enumerate(gap_N)
        ]
    rival = best_baseline(cells)
    said = "each client's accuracy with pFedLoRA less that with the best baseline"
    said += f", {rival.entry.label}" if rival else ""
    said += ", each method in its best round, percentage points; the paper's Figure 5"
    return Sheet(title, caution, [said, *notes], rows, records or [{"seed": None, "client": None}])


def differences(cells: Sequence[Cell], results: Results) -> dict[int, np.ndarray]:
    """seed -> [N] ours less the best baseline, percentage points; seeds that both have."""
    rival = best_baseline(cells)
    if rival is None:
        return {}
    found = by_client(results, (OURS, rival.entry.key))
    return {seed: columns[OURS] - columns[rival.entry.key] for seed, columns in found.items()}


def overview(
    title: str, caution: str, notes: Sequence[str], tables: Mapping[str, Sequence[Cell]], seeds: int
) -> Sheet:
    """The best accuracy: methods down, cases across."""
    at = {said: {cell.entry.key: cell for cell in cells} for said, cells in tables.items()}
    labels = {cell.entry.key: cell.entry.label for cells in tables.values() for cell in cells}

    def best(said, key):
        return show(at[said][key].best) if key in at[said] else ""

    rows = [("", *tables)] + [
        (label, *(best(said, key) for said in tables)) for key, label in labels.items()
    ]
    records = [{"case": said} | record(cell) for said, cells in tables.items() for cell in cells]
    return Sheet(title, caution, [METRIC, spread(seeds, _NO_TABLES), *notes], rows, records)


def _ours(cells: Sequence[Cell]) -> Cell | None:
    return next((cell for cell in cells if cell.entry.key == OURS and cell.done), None)


def _ratios(mine: Spent, ours: Spent) -> Spent:
    return Spent(*(a / b if b else np.nan for a, b in zip(mine, ours, strict=True)))


def _number(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
