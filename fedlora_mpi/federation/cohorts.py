"""Which clients train together, and which take part.

Groups depend on the clients alone, never on the ranks: a client's numbers may depend on which
others of its group take part (another kernel for another stack), so a group stays whole wherever it
is hosted.
"""

from collections.abc import Sequence

Group = tuple[int, ...]


def group_clients(
    sizes: Sequence[int], group_size: int, kind_of: Sequence[int] | None = None
) -> tuple[Group, ...]:
    """Client ids in groups of up to ``group_size``, all of one kind (default: there is one), larger
    clients first, so that a group's clients are about equally large and those still training are
    always the first of the group."""
    kind_of, client_groups = kind_of or [0] * len(sizes), []
    order = sorted(range(len(sizes)), key=lambda client: (-sizes[client], client))
    for kind in sorted(set(kind_of)):
        same_kind = [client for client in order if kind_of[client] == kind]
        client_groups += [
            tuple(same_kind[i : i + group_size]) for i in range(0, len(same_kind), group_size)
        ]
    return tuple(client_groups)


def take_cohort(clients: int, fraction: float, permutation: Sequence[int]) -> frozenset[int]:
    """The clients of a round: the first max(1, floor(fraction * clients)) of the
    ``permutation``.
    """
    # 0.29 * 100 is 28.999...
    return frozenset(permutation[: max(1, int(fraction * clients + 1e-9))])
