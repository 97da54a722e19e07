"""A table of methods that each have a learning rate of their own: late score, and its gain."""

from collections.abc import Mapping, Sequence

import numpy as np

from .grid import Entry, Score, Tuning
from .paper import Accuracy
from .results import LATE_ROUNDS, Result
from .sheet import Cell, Sheet, format_accuracy, format_difference, seed_stat


def tuned_sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    results: Mapping[str, Sequence[Result]],
    base: Entry,
    score: Score,
    logged: Mapping[str, str] | None = None,
) -> Sheet:
    """A row for each method: its learning rate, the score in the last rounds, and its difference
    from that of ``base`` with the same seed.

    logged: column of the log -> heading; the mean over rounds and seeds.
    """
    columns = logged or {}
    rows = [("", "lr", "seeds", "late", f"- {base.label}", *columns.values())]
    records = []
    base_late = {r.job.seed: r.late(score) for r in results.get(base.key, ())}
    for cell in cells:
        entry, found = cell.entry, results[cell.entry.key]
        late_of = {r.job.seed: r.late(score) for r in found}
        late = seed_stat([*late_of.values()])
        gain = seed_stat([late_of[seed] - base_late[seed] for seed in late_of if seed in base_late])
        means = logged_means(found, columns)
        lr = np.nan if entry.lr is None else entry.lr
        rows.append(
            (
                entry.label,
                "-" if np.isnan(lr) else f"{lr:g}",
                f"{cell.num_seeds}/{seeds}",
                format_accuracy(late),
                format_gain(gain),
                *("-" if np.isnan(number) else f"{number:.3g}" for number in means.values()),
            )
        )
        records.append(
            {"entry": entry.key, "label": entry.label, "lr": lr, "seeds": cell.num_seeds}
            | {"late_mean": late.mean, "late_std": late.std}
            | {"gain_mean": gain.mean, "gain_std": gain.std}
            | means
        )
    return Sheet(title, caution, notes, rows, records)


def late_note(base: Entry, judged: str, score: Score) -> str:
    """A note that explains the score and the gain; ``judged`` says whose score it is."""
    direction = "" if score.higher_is_better else ", lower is better"
    return (
        f"late: {score.label} of {judged}, mean over the clients' test data and over the last "
        f"{LATE_ROUNDS} rounds{direction}; - {base.label}: the mean difference between equal seeds"
    )


def rate_note(tuning: Tuning, cells: Sequence[Cell]) -> str:
    """A note that says how the learning rates were chosen, and which stand at an end of the list:
    a rate beyond it may be better.
    """
    rates = ", ".join(f"{rate:g}" for rate in tuning.rates)
    note = f"lr: of {rates} the best in the last rounds with seed {tuning.seed}"
    ends = (min(tuning.rates), max(tuning.rates))
    if labels := ", ".join(cell.entry.label for cell in cells if cell.entry.lr in ends):
        note += f"; at an end of this list, so that a rate beyond it may be better: {labels}"
    return note


def format_gain(value: Accuracy) -> str:
    """A mean difference with its standard deviation as text; "-" where unknown."""
    spread = "" if np.isnan(value.std) else f" ± {value.std:.2f}"
    return format_difference(value.mean) + spread


def logged_means(results: Sequence[Result], columns: Mapping[str, str]) -> dict[str, float]:
    """The columns of the log that ``columns`` names: the mean over rounds and seeds. NaN without a
    result, or if the method logs no such column.
    """
    return {
        name: float(np.mean([r.rounds.get(name, np.nan) for r in results])) if results else np.nan
        for name in columns
    }
