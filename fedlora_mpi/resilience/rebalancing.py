"""Clients move to other ranks once it is known how long each kind of them takes.

Before the first round a group's cost is its samples times the FLOPs of its network, but FLOPs of
one network are faster than those of another. Where the slowest worker would be done clearly
earlier, groups move, their personal rows in one message. Which rank trains a client changes no
number.
"""

from collections.abc import Sequence

from ..core.scheduling import assign
from ..federation.federation import Run, State
from .recovery import carried, keeping, rehomed
from .replicas import packed

_WORTH = 0.9  # of the time of the slowest worker, below which moving pays


def due(run: Run, round_: int) -> bool:
    """Whether to look after so many rounds: after the second, the fourth, the eighth ... (the first
    warms up), where clients of several kinds are on several workers.
    """
    return (
        len(run.kinds) > 1 and len(set(run.host)) > 1 and round_ > 1 and round_ & (round_ - 1) == 0
    )


def balanced(run: Run, state: State, workers: Sequence[int], route: str) -> tuple[Run, State]:
    """The run and the state when every group is where it takes the slowest worker least; every rank
    calls it.

    workers: the ranks that host clients; route: of mixes, see ``Mixing.of``. Raises Lost on all
    ranks or none, and then what was there before is untouched.
    """
    taken = run.pace.taken.copy()
    run.comm.sum(taken)  # equal on all ranks, if not on all numbers of ranks
    seconds, samples = taken
    if not (samples > 0).all():  # nobody of some kind has taken part yet
        return run, state
    costs = tuple(
        sum(run.sizes[c] for c in g) * (seconds / samples)[run.kind_of[g[0]]] for g in run.groups
    )
    host = assign(costs, workers)

    def slowest(host):
        return max(
            sum(cost for cost, at in zip(costs, host, strict=True) if at == w) for w in workers
        )

    if slowest(host) > _WORTH * slowest(run.host):
        return run, state
    if run.journal:
        run.journal.settle()
    after = rehomed(run.with_(costs=costs), run.comm, host, workers, route)
    source = {c: rank for c, rank in run.rank_of.items() if rank != after.rank_of[c]}

    def row(client):
        return packed(run, state.personal, client)

    state = state._replace(personal=carried(after, source, row, row))
    return (keeping(after, state) if run.journal else after), state
