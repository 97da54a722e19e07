"""Clients move to other ranks once it is known how long each kind of them takes.

Before the first round a group's cost is its samples times the FLOPs of its network, but FLOPs of
one network are faster than those of another. Where the slowest worker would be done clearly
earlier, groups move, their personal rows in one message. Which rank trains a client changes no
number.
"""

from collections.abc import Sequence

from ..core.scheduling import assign_groups
from ..federation.federation import Run, State
from .recovery import move_rows, reassign_groups, with_replicas
from .replicas import pack_row

_MAX_TIME_RATIO = 0.9  # of the time of the slowest worker, below which moving pays


def is_rebalancing_due(run: Run, round_: int) -> bool:
    """Whether to look after so many rounds: after the second, the fourth, the eighth ... (the first
    warms up), where clients of several kinds are on several workers.
    """
    return (
        len(run.kinds) > 1
        and len(set(run.rank_of_group)) > 1
        and round_ > 1
        and round_ & (round_ - 1) == 0
    )


def rebalance(run: Run, state: State, workers: Sequence[int], route: str) -> tuple[Run, State]:
    """The run and the state when every group is where it takes the slowest worker least; every rank
    calls it.

    workers: the ranks that host clients; route: of mixes, see ``Mixing.of``. Raises Lost on all
    ranks or none, and then what was there before is untouched.
    """
    totals = run.throughput.totals.copy()
    run.comm.sum(totals)  # equal on all ranks, if not on all numbers of ranks
    seconds, samples = totals
    if not (samples > 0).all():  # nobody of some kind has taken part yet
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
