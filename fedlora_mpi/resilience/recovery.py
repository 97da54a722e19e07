"""A run that outlives ranks: who goes on, from which round, and where the clients of the dead live
from then on.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..aggregation.client_mix import Mixing
from ..config.experiment import Faults
from ..core.scheduling import assign
from ..core.tree import Tree
from ..federation.federation import Run, State
from ..mpi.comm import Comm, Mpi
from ..mpi.ending import Everywhere, Orphaned, together
from ..mpi.pending import Lost
from ..mpi.watchdog import watching
from .replicas import Journal, Words, guard, size, split, unpack


class Unrecoverable(Exception):
    """The memory of those that are left does not hold a whole state; every rank comes to this."""


class Plan(NamedTuple):
    """What all ranks that are left do, the same on each."""

    round: int  # rounds done
    saved: int  # the newest round of which rank 0 knows a checkpoint
    number: dict[int, int]  # rank before -> rank now, of those that are left


def lasting(
    faults: Faults,
    source: str,
    folder: Path,
    comm: Comm,
    begin: Callable[[Comm], int],
    again: Callable[[Comm], int],
) -> int:
    """``begin(comm)``, watched; after a death that it does not survive by itself ``again``, by
    those that are left.

    Any end but a mistake of the user's says how to go on with the run ``folder``. Raises Refused on
    all ranks when they cannot outlive one.
    """

    def able() -> None:
        if faults.tolerate and comm.size > 1 and not comm.tolerant:
            raise ValueError(
                f"{source}: faults.tolerate = true: these ranks cannot outlive one of them; "
                "launch Open MPI 5 or newer as 'mpirun --with-ft ulfm ...', or set "
                "faults.tolerate=false"
            )

    launcher = (
        f"mpirun {'--with-ft ulfm ' if faults.tolerate else ''}-n {comm.size} "
        if comm.size > 1
        else ""
    )
    way_out = f"continue with '{launcher}fedlora-mpi resume {folder}'"
    try:
        with watching(comm, faults.timeout, folder, way_out):
            while True:
                try:
                    together(comm, able)
                    return begin(comm)
                except Lost as lost:
                    if not faults.tolerate:
                        raise
                    comm, begin = left(lost, comm), again
                    comm.pulse.at("the set-up", round_=0)
    except Exception as error:
        if folder.is_dir() and (isinstance(error, Orphaned) or not isinstance(error, Everywhere)):
            error.add_note(way_out)
        raise


def keeping(run: Run, state: State) -> Run:
    """``run`` with copies in memory, from which it goes on ``without`` a rank. Raises Lost on all
    ranks or none.
    """
    if run.comm.size == 1:
        return run
    journal = Journal(run, state)
    run.comm.agree()
    return run.with_(journal=journal)


def without(
    lost: Lost,
    run: Run,
    saved: int,
    workers: Callable[[int], Sequence[int]],
    route: str,
    alone: Callable[[Comm], Run],
) -> tuple[Run, State, int, str]:
    """The run after ``lost``, its state, the newest round with a checkpoint, and a line about it.

    saved: that round as this rank knows it; workers: which of so many ranks host clients; route: of
    mixes, see ``Mixing.of``; alone: the run as rank 0 builds it when nobody else is left. Raises
    Lost on all ranks that are left when their memory does not hold the whole state, and Orphaned on
    all when rank 0 is dead.
    """
    began, before = time.perf_counter(), run.comm
    while True:
        comm = left(lost, before)
        try:
            plan = _plan(run, comm, saved)
            after, state = _recovered(run, comm, plan, workers(comm.size), route, alone)
            break
        except Lost as another:
            lost = another  # what was there before is untouched: again from there, by fewer
        except Unrecoverable:
            raise Lost(comm) from None  # though all of these are alive
    dead = [rank for rank in range(before.size) if rank not in plan.number]
    clients = sum(len(run.clients_of(rank)) for rank in dead)
    seconds = time.perf_counter() - began
    line = going_on([before.members[rank] for rank in dead], comm, state.round)
    again = run.journal.present.state.round - state.round
    line = (
        f"{line} after {seconds:.2f} s; clients moved: {clients}; finished rounds played again: "
        f"{again}"
    )
    return after, state, plan.saved, line


def going_on(dead: Sequence[int], comm: Comm, round_: int) -> str:
    """The line about ``dead`` ranks of MPI_COMM_WORLD."""
    return f"lost rank {', '.join(map(str, dead))}: {comm.size} ranks go on with round {round_ + 1}"


def left(lost: Lost, before: Mpi) -> Mpi:
    """The ranks that are left of ``before``. Raises Orphaned on all of them where rank 0 is not
    among them.
    """
    comm = lost.left()
    if comm.members[0] != before.members[0]:
        raise Orphaned("rank 0, which has the log, has died", speaker=comm.members[0])
    return comm


def _plan(run: Run, comm: Mpi, saved: int) -> Plan:
    """What to do without the dead of ``run``: one table is summed. Raises Lost on all ranks or
    none.

    Raises Unrecoverable on all where a rank has died together with the one that had its copies.
    """
    old, journal = run.comm, run.journal
    number = {old.members.index(member): rank for rank, member in enumerate(comm.members)}
    mine = [saved, *_two(journal.states()), *_two(journal.copies())]
    table = np.zeros((old.size, len(mine)), np.int64)
    table[old.rank] = mine
    comm.sum(table)  # each row is set by one rank
    comm.agree()
    have = [{*table[rank, 1:3].tolist()} for rank in number]
    for keeper in (
        guard(rank, old.size)
        for rank in range(old.size)
        if rank not in number and run.clients_of(rank)
    ):
        have.append({*table[keeper, 3:].tolist()} if keeper in number else set())
    if not (common := set.intersection(*have)):
        raise Unrecoverable
    return Plan(max(common), int(table[0, 0]), number)


def _two(rounds: Sequence[int]) -> tuple[int, int]:
    """One or two numbers as two."""
    return rounds[0], rounds[-1]


def _recovered(
    run: Run,
    comm: Mpi,
    plan: Plan,
    workers: Sequence[int],
    route: str,
    alone: Callable[[Comm], Run],
) -> tuple[Run, State]:
    """The run on the ranks that are left, and its state. Nothing of ``run`` is changed. Raises Lost
    on all ranks or none.
    """
    if comm.rank in workers and run.trainer.feed is None:
        comm.pulse.at("the set-up", round_=0)
        after = alone(comm)
    else:
        # the others stay
        host = assign(run.costs, workers, [plan.number.get(rank) for rank in run.host])
        after = rehomed(run, comm, host, workers, route)
    orphans = {
        c: guard(rank, run.comm.size) for c, rank in run.rank_of.items() if rank not in plan.number
    }
    source = {c: plan.number[keeper] for c, keeper in orphans.items()}
    journal, at = run.journal, plan.round
    personal = carried(
        after,
        source,
        lambda client: journal.copy(client, at),
        lambda client: journal.row(client, at),
    )
    state = journal.state(at)._replace(personal=personal)
    if comm.size > 1:
        after = after.with_(journal=Journal(after, state))
    comm.agree()
    return after, state


def rehomed(run: Run, comm: Comm, host: Sequence[int], workers: Sequence[int], route: str) -> Run:
    """``run`` on the ranks of ``comm`` with its groups on the ranks ``host``, without a journal."""
    after = run.with_(comm=comm, host=tuple(host), journal=None)
    rank_of = [after.rank_of[c] for c in range(len(run.kind_of))]
    return after.with_(mixing=Mixing.of(run.algorithm, run.kinds[0].first, rank_of, workers, route))


def carried(
    run: Run, source: dict[int, int], copy: Callable[[int], Words], row: Callable[[int], Words]
) -> Tree:
    """The personal leaves of this rank's clients, of whom some come from other ranks.

    source: the rank that has each client that moves; copy: what this rank has of one that goes;
    row: of one that stays.
    """
    comm = run.comm

    def between(a, b):
        return [c for c in sorted(source) if source[c] == a and run.rank_of[c] == b]

    going = [between(comm.rank, rank) for rank in range(comm.size)]
    coming = [between(rank, comm.rank) for rank in range(comm.size)]

    # of float32, which is what ``exchange`` moves
    def numbers(clients):
        return 2 * sum(size(run, c) for c in clients)

    send = np.concatenate([np.empty(0, np.int64), *(copy(c) for clients in going for c in clients)])
    words = comm.exchange(
        send.view(np.float32), [*map(numbers, going)], [*map(numbers, coming)]
    ).view(np.int64)
    moved, personal = split(run, [c for clients in coming for c in clients], words), run.room()
    for client in run.hosted:
        unpack(run, moved[client] if client in moved else row(client), client, personal)
    return personal
