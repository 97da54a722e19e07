"""Turn proportions into whole numbers of samples per client and pool."""

from collections.abc import Iterator

import numpy as np


def round_shares(total: int, mix: np.ndarray) -> Iterator[int]:
    """Yield int(total * share + 0.5) for each share, but never more than is left of ``total``."""
    left = total
    for share in mix:
        n = min(int(total * share + 0.5), left)
        left -= n
        yield n


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Return integers in proportion to ``weights`` that add up to ``total``.

    Each is rounded down; the rest goes to the entries with the largest remainders.
    """
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    remainder_rows = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[remainder_rows] += 1
    return counts


def split_pools(sizes: list[int], shares: np.ndarray) -> np.ndarray:
    """Return the counts [N, pools] that split each pool by its column of ``shares``.

    The columns add up to ``sizes``.
    """
    return np.stack(
        [apportion(size, column) for size, column in zip(sizes, shares.T, strict=True)], axis=1
    )


def limit_rows(counts: np.ndarray, limit: int) -> np.ndarray:
    """Return ``counts`` [N, pools] with at most ``limit`` samples in each row; 0: no limit.

    A row above the limit is scaled down to it in proportion.
    """
    return np.stack([apportion(limit, row) if 0 < limit < row.sum() else row for row in counts])


def ensure_minimum(counts: np.ndarray, minimum: int, preferences: np.ndarray) -> np.ndarray:
    """Return ``counts`` [N, pools] with samples moved until every row has at least ``minimum``.

    A client below the minimum receives one sample at a time. The sample comes from the pool that
    the client prefers (``preferences`` [N, pools]) among those held by clients above the minimum.
    The client with the most samples of that pool gives it. The loop ends: each move fills one gap,
    no giver falls below the minimum, and a giver exists while the total suffices. Raises ValueError
    if the total does not suffice.
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
