"""The pFedLoRA paper's tables: what a method has spent when its accuracy first reaches a target,
and which method is ahead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .paper import PFEDLORA
from .pfedlora_table import TABLE_NAME, AdapterCost, implied_by_claims, is_pfedlora
from .results import Result
from .sheet import (
    METRIC_NOTE,
    Cell,
    Sheet,
    accuracy_by_client,
    csv_record,
    format_accuracy,
    format_difference,
    spread_note,
)

# a method more than this many percentage points below the best does not lower the common target
MAX_GAP = 10.0
UNITS = {"rounds": (1.0, "rounds"), "bytes": (1e6, "MB"), "flops": (1e12, "TFLOP")}
FLOAT32_BYTES = 4
# FLOPs of a round of pFedLoRA / of FedProto for which the claims' consequences are printed; see
# ``implied_by_claims``
LIKELY_FLOPS_RATIOS = (1.0, 4 / 3)
_NO_TABLES_NOTE = "the paper's tables could not be had, only its claims"
_CLAIMS_NOTES = (
    f"the paper's claims: what {PFEDLORA['flops']} times fewer FLOPs and {PFEDLORA['bytes']} times "
    "fewer bytes imply if both are against FedProto in one experiment; from an adapter whose "
    "training costs nothing to one that trains for as many epochs as the network",
    "numbers of the adapter: what a client sends up in a round, with any network; the "
    "paper's, from what FedProto sends in the paper's split",
)
ResultsByMethod = Mapping[str, Sequence[Result]]  # key of the entry -> finished seeds


class Cost(NamedTuple):
    """Totals over all clients: rounds, bytes up and down, FLOPs of training. NaN where unknown."""

    rounds: float
    bytes: float
    flops: float


class Curve(NamedTuple):
    """The accuracy in per cent after each round, and the total costs up to that round, [T] each."""

    accuracy: np.ndarray
    rounds: np.ndarray
    bytes: np.ndarray
    flops: np.ndarray

    @classmethod
    def from_result(cls, result: Result) -> "Curve":
        """The curve of one run."""
        columns = result.rounds
        traffic = np.cumsum(columns["bytes_up"] + columns["bytes_down"])
        return cls(
            100 * columns["accuracy"], columns["round"], traffic, np.cumsum(columns["flops"])
        )

    @classmethod
    def seed_mean(cls, results: Sequence[Result]) -> "Curve":
        """The mean curve over seeds."""
        return cls(
            *(
                np.mean(columns, axis=0)
                for columns in zip(*map(cls.from_result, results), strict=True)
            )
        )

    def cost_until(self, target: float) -> Cost:
        """The costs up to the end of the first round whose accuracy is at least ``target``. NaN if
        there is no such round.
        """
        reached = np.flatnonzero(self.accuracy >= target)
        return Cost(*(float(column[reached[0]]) if len(reached) else np.nan for column in self[1:]))


def mean_cost_until(results: Sequence[Result], target: float) -> Cost:
    """The mean cost over seeds. NaN unless every seed reaches the target."""
    costs = [Curve.from_result(result).cost_until(target) for result in results]
    return Cost(*np.mean(costs, axis=0)) if costs else Cost(np.nan, np.nan, np.nan)


def common_target(results: ResultsByMethod) -> tuple[float, list[str]]:
    """The highest accuracy that every method reaches with every seed, and the methods left out.

    The accuracy is in per cent, rounded down to two decimals; NaN without results. A method is left
    out if its best accuracy (mean over seeds) is more than ``MAX_GAP`` below that of the best
    method.
    """
    best = {
        key: np.mean([result.best for result in seeds]) for key, seeds in results.items() if seeds
    }
    floor = max(best.values(), default=np.nan) - MAX_GAP
    left_out = [key for key, value in best.items() if value < floor]
    lowest = min(
        (r.best for key in best if key not in left_out for r in results[key]), default=np.nan
    )
    return float(np.floor(100 * lowest) / 100), left_out


def best_baseline(cells: Sequence[Cell]) -> Cell | None:
    """The most accurate method other than pFedLoRA. None without finished runs."""
    baselines = [cell for cell in cells if cell.num_seeds and not is_pfedlora(cell.entry)]
    return max(baselines, key=lambda cell: cell.best.mean, default=None)


def own_cell(cells: Sequence[Cell]) -> Cell | None:
    """The first row of pFedLoRA, with which the others are compared. None without finished runs."""
    return next((cell for cell in _pfedlora_cells(cells)[:1] if cell.num_seeds), None)


def accuracy_sheet(
    title: str, caution: str, notes: Sequence[str], cells: Sequence[Cell], seeds: int
) -> Sheet:
    """A row for each method: best and last accuracy, and how far pFedLoRA is ahead."""
    ours, rival = own_cell(cells), best_baseline(cells)

    def lead_over(cell, own=ours):
        return own.best.mean - cell.best.mean if own and cell else np.nan

    rows = [("", "seeds", "best", "last", f"{TABLE_NAME} ahead by")]
    for cell in cells:
        lead_text = "" if cell is ours else format_difference(lead_over(cell))
        rows.append(
            (
                cell.entry.label,
                f"{cell.num_seeds}/{seeds}",
                format_accuracy(cell.best),
                format_accuracy(cell.last),
                lead_text,
            )
        )
    rival_note = f" ({rival.entry.label})" if rival else ""
    claim = (
        f"ahead of the best baseline: the paper {PFEDLORA['accuracy']:+}, here "
        f"{format_difference(lead_over(rival))}{rival_note}"
    )
    claim += "".join(
        f"; {cell.entry.label}: {format_difference(lead_over(rival, cell))}"
        for cell in _pfedlora_cells(cells)[1:]
    )
    records = [csv_record(cell) | {"ahead": lead_over(cell)} for cell in cells]
    return Sheet(
        title,
        caution,
        [claim, METRIC_NOTE, spread_note(seeds, _NO_TABLES_NOTE), *notes, *_own_row_note(cells)],
        rows,
        records,
    )


def target_sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    results: ResultsByMethod,
    percent: float,
) -> Sheet:
    """A row for each method: its cost up to an accuracy of ``percent``, and the ratio of this cost
    to that of pFedLoRA.
    """
    cost_of = {cell.entry.key: mean_cost_until(results[cell.entry.key], percent) for cell in cells}
    ours = own_cell(cells)
    own_cost = cost_of[ours.entry.key] if ours else Cost(np.nan, np.nan, np.nan)

    def ratio(key):
        return _cost_ratios(cost_of[key], own_cost)

    rows = [
        ("", *(unit for _, unit in UNITS.values()), *(f"{name} / {TABLE_NAME}" for name in UNITS))
    ]
    records = []
    for cell in cells:
        cost, ratios_to_ours = cost_of[cell.entry.key], ratio(cell.entry.key)
        cost_texts = [
            _format_number(n / unit) for n, (unit, _) in zip(cost, UNITS.values(), strict=True)
        ]
        rows.append((cell.entry.label, *cost_texts, *map(_format_number, ratios_to_ours)))
        ratios = {f"{name}_ratio": n for name, n in ratios_to_ours._asdict().items()}
        records.append({"entry": cell.entry.key, "target": percent} | cost._asdict() | ratios)
    explanation = (
        "until the accuracy first reaches the target, all clients together: bytes sent up and "
        "down (float32), FLOPs "
    )
    explanation += "of local training; mean over seeds; -: some seed does not reach it"
    rivals = {cell.entry.key: cell.entry.label for cell in (best_baseline(cells),) if cell}
    rivals |= {cell.entry.key: cell.entry.label for cell in cells if cell.entry.key == "fedproto"}
    measured = [
        f"{label} takes {_format_number(ratio(k).flops)} and {_format_number(ratio(k).bytes)} times"
        for k, label in rivals.items()
    ]
    claim = (
        f"computation and communication against the best baseline: the paper {PFEDLORA['flops']} "
        "and "
    )
    claim += (
        f"{PFEDLORA['bytes']} times less (it names FedProto); here {', '.join(measured) or '-'}"
    )
    return Sheet(
        f"{title}; cost of {_format_target(percent)}",
        caution,
        [claim, explanation, *notes, *_own_row_note(cells)],
        rows,
        records,
    )


def claims_sheet(
    title: str,
    caution: str,
    data: str,
    cells: Sequence[Cell],
    results: ResultsByMethod,
    targets: Sequence[float],
) -> Sheet:
    """What the paper's claims about costs imply, and a row for each adapter of ours.

    ``targets``: accuracies in per cent, each with a column for its ratio of rounds.
    """
    low, high = (implied_by_claims(data, ratio) for ratio in LIKELY_FLOPS_RATIOS)
    implied = [
        f"{_format_number(a)} to {_format_number(b)}" for a, b in zip(low, high, strict=True)
    ]
    ratio_names = [f"rounds of FedProto / its, {_format_target(target)}" for target in targets]
    rows = [("", "numbers of the adapter", "FLOPs a round / FedProto", *ratio_names)]
    rows.append(("the paper's claims", *implied[:2], *[implied[2]] * len(targets)))
    records: list[dict[str, Any]] = [
        {"entry": f"claims_{name}", "target": np.nan} | cost._asdict()
        for name, cost in (("low", low), ("high", high))
    ]
    for cell in _pfedlora_cells(cells):
        seeds, rivals = results[cell.entry.key], results.get("fedproto", ())
        costs = [adapter_cost(seeds, rivals, target) for target in targets]
        ratios = [_format_number(cost.rounds_ratio) for cost in costs]
        rows.append((cell.entry.label, *map(_format_number, costs[0][:2]), *ratios))
        records += [
            {"entry": cell.entry.key, "target": target} | cost._asdict()
            for target, cost in zip(targets, costs, strict=True)
        ]
    return Sheet(f"{title}; the claims about costs", caution, [*_CLAIMS_NOTES], rows, records)


def adapter_cost(
    seeds: Sequence[Result], fedproto_seeds: Sequence[Result], target: float
) -> AdapterCost:
    """What our runs have of what the claims depend on. ``target`` is in per cent.

    The adapter has one shape beside all networks of a run.
    """
    numels = [r.rounds["bytes_up"].sum() / r.rounds["clients"].sum() / FLOAT32_BYTES for r in seeds]
    flops, fedproto_flops = (
        np.mean([r.rounds["flops"] for r in runs]) if runs else np.nan
        for runs in (seeds, fedproto_seeds)
    )
    own_cost, fedproto_cost = (mean_cost_until(runs, target) for runs in (seeds, fedproto_seeds))
    return AdapterCost(
        float(np.mean(numels)) if numels else np.nan,
        float(flops / fedproto_flops),
        fedproto_cost.rounds / own_cost.rounds,
    )


def client_gains_sheet(
    title: str, caution: str, notes: Sequence[str], cells: Sequence[Cell], results: ResultsByMethod
) -> Sheet:
    """A row for each seed: how much each client gains from pFedLoRA over the best baseline."""
    rows: list[tuple[str, ...]] = [
        ("seed", "clients", "better", "equal", "worse", "mean", "highest", "lowest")
    ]
    records = []
    for seed, gap_N in client_gains(cells, results).items():
        counts = (np.count_nonzero(side) for side in (gap_N > 0, gap_N == 0, gap_N < 0))
        numbers = map(format_difference, (gap_N.mean(), gap_N.max(), gap_N.min()))
        rows.append((str(seed), str(len(gap_N)), *map(str, counts), *numbers))
        records += [
            {"seed": seed, "client": client, "difference": gap} for client, gap in enumerate(gap_N)
        ]
    rival = best_baseline(cells)
    explanation = "each client's accuracy with pFedLoRA less that with the best baseline"
    explanation += f", {rival.entry.label}" if rival else ""
    explanation += ", each method in its best round, percentage points; the paper's Figure 5"
    return Sheet(
        title,
        caution,
        [explanation, *notes, *_own_row_note(cells)],
        rows,
        records or [{"seed": None, "client": None}],
    )


def client_gains(cells: Sequence[Cell], results: ResultsByMethod) -> dict[int, np.ndarray]:
    """The accuracy with pFedLoRA minus that with the best baseline: seed -> [N], percentage points.

    Only seeds that both methods have finished are included.
    """
    ours, rival = own_cell(cells), best_baseline(cells)
    if ours is None or rival is None:
        return {}
    accuracy_of = accuracy_by_client(results, (ours.entry.key, rival.entry.key))
    return {
        seed: columns[ours.entry.key] - columns[rival.entry.key]
        for seed, columns in accuracy_of.items()
    }


def overview_sheet(
    title: str, caution: str, notes: Sequence[str], tables: Mapping[str, Sequence[Cell]], seeds: int
) -> Sheet:
    """The best accuracies: a row for each method, a column for each case."""
    cells_of = {
        case_name: {cell.entry.key: cell for cell in cells} for case_name, cells in tables.items()
    }
    labels = {cell.entry.key: cell.entry.label for cells in tables.values() for cell in cells}

    def best(said, key):
        return format_accuracy(cells_of[said][key].best) if key in cells_of[said] else ""

    rows = [("", *tables)] + [
        (label, *(best(said, key) for said in tables)) for key, label in labels.items()
    ]
    records = [
        {"case": said} | csv_record(cell) for said, cells in tables.items() for cell in cells
    ]
    return Sheet(
        title, caution, [METRIC_NOTE, spread_note(seeds, _NO_TABLES_NOTE), *notes], rows, records
    )


def _pfedlora_cells(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if is_pfedlora(cell.entry)]


def _own_row_note(cells: Sequence[Cell]) -> list[str]:
    """Which row ``pfedlora`` means, if there are several."""
    rows = _pfedlora_cells(cells)
    return [f"{TABLE_NAME}: the row {rows[0].entry.label}"] if len(rows) > 1 else []


def _cost_ratios(cost: Cost, own_cost: Cost) -> Cost:
    return Cost(*(a / b if b else np.nan for a, b in zip(cost, own_cost, strict=True)))


def _format_target(percent: float) -> str:
    return "no run yet" if np.isnan(percent) else f"{percent:g} %"


def _format_number(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
