"""Splits work into equal parts, and assigns it so that workers end at about the same time."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def assign_groups(
    costs: Sequence[float],
    workers: Sequence[int],
    fixed_workers: Sequence[int | None] | None = None,
) -> tuple[int, ...]:
    """The worker of each group.

    Groups are assigned by falling cost, each to the least loaded worker (Graham 1969). costs: one
    per group, in seconds or any unit; workers: ranks; fixed_workers: for each group the worker that
    keeps it, or None.
    """
    worker_of_group = list(fixed_workers or [None] * len(costs))
    load: dict[int, float] = {
        w: sum(cost for cost, at in zip(costs, worker_of_group, strict=True) if at == w)
        for w in workers
    }
    for group in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        if worker_of_group[group] is None:
            worker = min(load, key=lambda w: (load[w], w))
            worker_of_group[group] = worker
            load[worker] += costs[group]
    return tuple(w for w in worker_of_group if w is not None)


def equal_parts(members: Sequence[T], max_size: int) -> list[Sequence[T]]:
    """``members``, in order, in the fewest equal parts of at most ``max_size`` each."""
    parts = -(-len(members) // max_size)
    return [
        members[len(members) * i // parts : len(members) * (i + 1) // parts] for i in range(parts)
    ]
