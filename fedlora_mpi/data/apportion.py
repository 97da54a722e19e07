"""Whole samples from proportions: counts per client and pool that add up to what there is."""

from collections.abc import Iterator

import numpy as np


def round_shares(total: int, mix: np.ndarray) -> Iterator[int]:
    """int(total * share + 0.5) for each share, cut to what remains of ``total``."""
    left = total
    for share in mix:
        n = min(int(total * share + 0.5), left)
        left -= n
        yield n


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Integers in proportion to ``weights`` that add up to ``total``: largest remainders get the
    rest.
    """
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    remainder_rows = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[remainder_rows] += 1
    return counts


def split_pools(sizes: list[int], shares: np.ndarray) -> np.ndarray:
    """Every pool split by its column of ``shares``: [N, pools], the columns add up to ``sizes``."""
    return np.stack(
        [apportion(size, column) for size, column in zip(sizes, shares.T, strict=True)], axis=1
    )


def limit_rows(counts: np.ndarray, limit: int) -> np.ndarray:
    """Rows above ``limit`` samples thinned in proportion to it; 0: no limit."""
    return np.stack([apportion(limit, row) if 0 < limit < row.sum() else row for row in counts])


def ensure_minimum(counts: np.ndarray, minimum: int, preferences: np.ndarray) -> np.ndarray:
    """Samples moved until every row of ``counts`` [N, pools] adds up to ``minimum`` at least.

    A short client is given, one by one, a sample of the pool that it likes best among those that
    some client above the minimum holds; the giver is the largest holder. It ends: each move
    shortens the shortage by one, no giver becomes short, and one exists while the total suffices.
    """
    clients, total = len(counts), counts.sum()
    if clients * minimum > total:
        way_out = "clients or minimum" if minimum > 1 else "clients"
        raise ValueError(
            f"data.partition.clients = {clients}: at least {minimum} samples for each are "
            f"{clients * minimum}, and there are {total}; lower {way_out}"
        )
    counts = counts.copy()
    for k in range(clients):
        while counts[k].sum() < minimum:
            spare = np.where(counts.sum(axis=1, keepdims=True) > minimum, counts, 0)  # [N, pools]
            pool = max(np.flatnonzero(spare.any(axis=0)), key=lambda c: preferences[k, c])
            counts[spare[:, pool].argmax(), pool] -= 1
            counts[k, pool] += 1
    return counts
