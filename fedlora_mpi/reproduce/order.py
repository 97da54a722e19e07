"""How well the order of our entries agrees with the paper's: Spearman's rank correlation."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sheet import Cell

_DRAWS = 2000
_PAPER_SEEDS = 3
_RANDOM_STATE = 1904  # any number; the interval is a function of the results alone


def order_notes(cells: "Sequence[Cell]") -> "Iterator[str]":
    """A note on how well our order agrees with the paper's. Needs at least four entries."""
    pairs = [(c, c.entry.published) for c in cells if c.num_seeds and c.entry.published]
    if len(pairs) < 4:
        return
    found, published = [cell for cell, _ in pairs], np.array([tuple(value) for _, value in pairs])
    rho = rank_correlation(np.array([c.best.mean for c in found]), published[:, 0])
    seeds = sorted(set.intersection(*(set(c.best_by_seed) for c in found)))
    note = f"order of the {len(found)} entries against the paper's: rank correlation {rho:+.2f}"
    if len(seeds) > 1:
        ours = np.array([[c.best_by_seed[seed] for seed in seeds] for c in found])
        low, high = bootstrap_interval(ours, *published.T)
        note += (
            f", 95 % interval {low:+.2f} to {high:+.2f} (bootstrap over our {len(seeds)} seeds; "
            f"the paper's means drawn with their ± over {_PAPER_SEEDS} seeds)"
        )
    yield f"{note} (Spearman; 1 is the same)"


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two columns [M]; equal numbers share their mean rank. NaN if
    all numbers of a column are equal.
    """
    ranks = [(c[:, None] > c).sum(1) + (c[:, None] == c).sum(1) / 2 for c in (a, b)]
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


def bootstrap_interval(
    ours: np.ndarray, means: np.ndarray, stds: np.ndarray
) -> tuple[float, float]:
    """The 95 % interval of the rank correlation of our means with the paper's.

    ours: [M, S] entries by seeds. A draw takes S seeds with replacement, the same for all entries,
    since these share a split for each seed. means, stds: [M] the paper's; a draw of a mean is
    normal, with the standard error of ``_PAPER_SEEDS`` seeds. An unknown std counts as 0.
    """
    generator = np.random.default_rng(_RANDOM_STATE)
    errors = np.nan_to_num(stds) / _PAPER_SEEDS**0.5
    num_seeds, draws = ours.shape[1], []
    for _ in range(_DRAWS):
        chosen = generator.integers(num_seeds, size=num_seeds)
        paper = means + errors * generator.standard_normal(len(means))
        draws.append(rank_correlation(ours[:, chosen].mean(1), paper))
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
