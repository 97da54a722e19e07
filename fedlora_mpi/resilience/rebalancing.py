"""Moves clients to other ranks once the training time of each kind is known.

Before the first round a group's cost is its samples times the FLOPs of its network, but one
network takes longer for a FLOP than another. If the slowest worker would finish clearly earlier,
groups move, with their personal rows in one message. No result depends on which rank trains a
client.
"""

from collections.abc import Sequence

from ..core.scheduling import assign_groups
from ..federation.federation import Run, State
from .recovery import move_rows, reassign_groups, with_replicas
from .replicas import pack_row

_MAX_TIME_RATIO = 0.9  # groups move if the slowest worker then takes less than this fraction


def is_rebalancing_due(run: Run, round_: int) -> bool:
    """Whether to rebalance after so many rounds: after the second, the fourth, the eighth ...

    The first round warms up. One kind of client, or one worker, needs no rebalancing.
    """
    return (
        len(run.kinds) > 1
        and len(set(run.rank_of_group)) > 1
        and round_ > 1
        and round_ & (round_ - 1) == 0
    )


def rebalance(run: Run, state: State, workers: Sequence[int], route: str) -> tuple[Run, State]:
    """The run and the state with the groups where the slowest worker takes least; every rank calls
    it.

    workers: the ranks that host clients; route: of mixes, see ``Mixing.of``. Raises RankLost on all
    ranks or none; ``run`` and ``state`` are then unchanged.
    """
    totals = run.throughput.totals.copy()
    run.comm.sum(totals)  # equal on all ranks, but not for every number of ranks
    seconds, samples = totals
    if not (samples > 0).all():  # some kind has not taken part yet
        return run, state
    costs = tuple(
        sum(run.sizes[c] for c in g) * (seconds / samples)[run.kind_of[g[0]]] for g in run.groups
    )
    host = assign_groups(costs, workers)

    def slowest_load(host):
        return max(
            sum(cost for cost, at in zip(costs, host, strict=True) if at == w) for w in workers
        )

    if slowest_load(host) > _MAX_TIME_RATIO * slowest_load(run.rank_of_group):
        return run, state
    if run.journal:
        run.journal.wait()
    rebalanced = reassign_groups(run.with_fields(costs=costs), run.comm, host, workers, route)
    source = {
        c: rank for c, rank in run.rank_of_client.items() if rank != rebalanced.rank_of_client[c]
    }

    def pack_client(client):
        return pack_row(run, state.personal, client)

    state = state._replace(personal=move_rows(rebalanced, source, pack_client, pack_client))
    return (with_replicas(rebalanced, state) if run.journal else rebalanced), state
