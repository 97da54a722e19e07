"""Work in equal parts, and on workers that end at about the same time."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def assign(
    costs: Sequence[float], workers: Sequence[int], stays: Sequence[int | None] | None = None
) -> tuple[int, ...]:
    """The worker of each group: the longest first, each to the least loaded worker (Graham 1969).

    costs: expected seconds or any unit, one per group; workers: ranks; stays: where a group is
    already, or None.
    """
    host = list(stays or [None] * len(costs))
    load = {w: sum(cost for cost, at in zip(costs, host, strict=True) if at == w) for w in workers}
    for group in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        if host[group] is None:
            host[group] = min(load, key=lambda w: (load[w], w))
            load[host[group]] += costs[group]
    return tuple(host)


def equal_parts(members: Sequence[T], most: int) -> list[Sequence[T]]:
    """``members``, in order, in as few equal parts as have at most ``most`` each."""
    parts = -(-len(members) // most)
    return [
        members[len(members) * i // parts : len(members) * (i + 1) // parts] for i in range(parts)
    ]
