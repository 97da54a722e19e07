"""Moves clients to other ranks once the training time of each kind is known.

Before the first round a group's cost is its samples times the FLOPs of its network, but one
network takes longer for a FLOP than another. If the slowest worker would finish clearly earlier,
groups move, with their personal rows in one message. No result depends on which rank trains a
client.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..core.scheduling import assign_groups
from ..federation.federation import Federation, State
from .recovery import journal_of, move_rows, with_replicas
from .replicas import pack_row

_MAX_TIME_RATIO = 0.9  # groups move if the slowest worker then takes less than this fraction


def is_rebalancing_due(federation: Federation, round_: int) -> bool:
    """Whether to rebalance after so many rounds: after the second, the fourth, the eighth ...

    The first round warms up. One type of client, or one worker, needs no rebalancing.
    """
    return (
        len(federation.clients.types) > 1
        and len(set(federation.placement.rank_of_group)) > 1
        and round_ > 1
        and round_ & (round_ - 1) == 0
    )


def rebalance(
    federation: Federation, state: State, workers: Sequence[int], route: str
) -> tuple[Federation, State]:
    """The federation and the state with the groups where the slowest worker takes least; every rank
    calls it.

    workers: the ranks that host clients; route: of mixes, see ``Mixing.of``. Raises RankLost;
    ``federation`` and ``state`` are then unchanged.
    """
    totals = federation.instruments.throughput.copy()
    federation.comm.sum(totals)  # equal on all ranks, but not for every number of ranks
    seconds, samples = totals
    if not (samples > 0).all():  # some type has not taken part yet
        return federation, state
    clients, placement = federation.clients, federation.placement
    costs = tuple(
        sum(clients.sizes[c] for c in g) * (seconds / samples)[clients.type_of[g[0]]]
        for g in placement.groups
    )
    hosts = assign_groups(costs, workers)

    def slowest_load(hosts):
        return max(
            sum(cost for cost, at in zip(costs, hosts, strict=True) if at == w) for w in workers
        )

    if slowest_load(hosts) > _MAX_TIME_RATIO * slowest_load(placement.rank_of_group):
        return federation, state
    if journal := journal_of(federation):
        journal.wait()
    measured = replace(federation, placement=replace(placement, costs=costs))
    rebalanced = measured.on_ranks(federation.comm, hosts, workers, route)
    new_rank = rebalanced.placement.rank_of_client
    source = {c: rank for c, rank in placement.rank_of_client.items() if rank != new_rank[c]}

    def pack_client(client):
        return pack_row(federation, state.personal, client)

    state = state._replace(personal=move_rows(rebalanced, source, pack_client, pack_client))
    return (with_replicas(rebalanced, state) if journal else rebalanced), state
