"""Which clients train together, and which rank hosts them.

Groups depend on the clients alone, never on the ranks: a client's numbers may depend on which others of its group
take part (another kernel for another stack), so a group stays whole wherever it is hosted.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Group = tuple[int, ...]


def groups(sizes: Sequence[int], group_size: int, kind_of: Sequence[int] | None = None) -> tuple[Group, ...]:
    """Client ids in groups of up to ``group_size``, all of one kind (default: there is one), larger
    clients first, so that a group's clients are about equally large and those still training are
    always the first of the group."""
    kind_of, found = kind_of or [0] * len(sizes), []
    order = sorted(range(len(sizes)), key=lambda client: (-sizes[client], client))
    for kind in sorted(set(kind_of)):
        alike = [client for client in order if kind_of[client] == kind]
        found += [tuple(alike[i : i + group_size]) for i in range(0, len(alike), group_size)]
    return tuple(found)


def assign(
    costs: Sequence[float], workers: Sequence[int], stays: Sequence[int | None] | None = None
) -> tuple[int, ...]:
    """The worker of each group: the longest first, each to the least loaded worker (Graham 1969).

    costs: expected seconds or any unit, one per group; workers: ranks; stays: where a group is already, or None.
    """
    host = list(stays or [None] * len(costs))
    load = {w: sum(cost for cost, at in zip(costs, host) if at == w) for w in workers}
    for group in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        if host[group] is None:
            host[group] = min(load, key=lambda w: (load[w], w))
            load[host[group]] += costs[group]
    return tuple(host)


def equal_parts(members: Sequence[T], most: int) -> list[Sequence[T]]:
    """``members``, in order, in as few equal parts as have at most ``most`` each."""
    parts = -(-len(members) // most)
    return [members[len(members) * i // parts : len(members) * (i + 1) // parts] for i in range(parts)]


def cohort(clients: int, fraction: float, draw: Sequence[int]) -> frozenset[int]:
    """The clients of a round: the first max(1, floor(fraction * clients)) of the permutation ``draw``."""
    return frozenset(draw[: max(1, int(fraction * clients + 1e-9))])  # 0.29 * 100 is 28.999...
