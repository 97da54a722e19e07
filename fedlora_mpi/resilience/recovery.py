"""Recovery after a rank failure: which ranks go on, from which round, and which of them take over
the clients of the dead.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..aggregation.client_mix import Mixing
from ..config.experiment import Faults
from ..core.scheduling import assign_groups
from ..core.tree import Tree
from ..federation.federation import Run, State
from ..mpi.comm import Comm, Mpi, Solo
from ..mpi.ending import CollectiveExit, ServerLost, collectively
from ..mpi.pending import RankLost
from ..mpi.watchdog import watch_progress
from .replicas import Journal, Words, replica_rank, row_words, split_rows, unpack_row


class Unrecoverable(Exception):
    """The memory of the surviving ranks holds no complete state; raised on all of them."""


class RecoveryPlan(NamedTuple):
    """What the surviving ranks do, the same on each."""

    round: int  # rounds done
    checkpoint_round: int  # the newest round with a checkpoint, as rank 0 knows it
    new_rank: dict[int, int]  # rank before -> rank now, of the survivors


def run_tolerant(
    faults: Faults,
    source: str,
    folder: Path,
    comm: Comm,
    begin: Callable[[Comm], int],
    resume: Callable[[Comm], int],
) -> int:
    """``begin(comm)``, watched; after a rank failure that it does not survive itself,
    ``resume(comm)`` on the surviving ranks.

    Every failure but the user's mistake says how to continue the run ``folder``. Raises Refusal on
    all ranks when they cannot survive the loss of one.
    """

    def check_tolerance() -> None:
        if faults.tolerate and comm.size > 1 and not comm.is_tolerant:
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
        with watch_progress(comm, faults.timeout, folder, way_out):
            while True:
                try:
                    collectively(comm, check_tolerance)
                    return begin(comm)
                except RankLost as lost:
                    if not faults.tolerate:
                        raise
                    comm, begin = surviving_comm(lost, comm), resume
                    comm.heartbeat.enter_stage("the set-up", round_=0)
    except Exception as error:
        if folder.is_dir() and (
            isinstance(error, ServerLost) or not isinstance(error, CollectiveExit)
        ):
            error.add_note(way_out)
        raise


def with_replicas(run: Run, state: State) -> Run:
    """``run`` with copies in memory, from which ``recover`` restores a lost rank.

    Raises RankLost on all ranks or none.
    """
    if run.comm.size == 1:
        return run
    journal = Journal(run, state)
    _require_mpi(run.comm).agree()
    return run.with_fields(journal=journal)


def recover(
    lost: RankLost,
    run: Run,
    checkpoint_round: int,
    workers: Callable[[int], Sequence[int]],
    route: str,
    rebuild: Callable[[Comm], Run],
) -> tuple[Run, State, int, str]:
    """The run after ``lost``, its state, the newest round with a checkpoint, and a line about it.

    checkpoint_round: that round as this rank knows it; workers: the ranks that host clients, of so
    many ranks; route: of mixes, see ``Mixing.of``; rebuild: builds the run on a rank that had no
    clients before. Raises RankLost on all surviving ranks when their memory holds no complete
    state, and ServerLost on all when rank 0 is dead.
    """
    started, old_comm = time.perf_counter(), _require_mpi(run.comm)
    while True:
        comm = surviving_comm(lost, old_comm)
        try:
            plan = _make_plan(run, comm, checkpoint_round)
            recovered, state = _recover_run(run, comm, plan, workers(comm.size), route, rebuild)
            break
        except RankLost as another:
            lost = another  # nothing has changed: try again with fewer ranks
        except Unrecoverable:
            raise RankLost(comm) from None  # although all of these ranks are alive
    dead = [rank for rank in range(old_comm.size) if rank not in plan.new_rank]
    clients = sum(len(run.clients_of(rank)) for rank in dead)
    seconds = time.perf_counter() - started
    line = recovery_line([old_comm.members[rank] for rank in dead], comm, state.round)
    rounds_replayed = _journal(run).current.state.round - state.round
    line = (
        f"{line} after {seconds:.2f} s; clients moved: {clients}; finished rounds played again: "
        f"{rounds_replayed}"
    )
    return recovered, state, plan.checkpoint_round, line


def recovery_line(dead: Sequence[int], comm: Comm, round_: int) -> str:
    """The line about ``dead`` ranks of MPI_COMM_WORLD."""
    return f"lost rank {', '.join(map(str, dead))}: {comm.size} ranks go on with round {round_ + 1}"


def _require_mpi(comm: Comm) -> Mpi:
    """``comm``, which has several ranks: only they lose one."""
    assert not isinstance(comm, Solo)
    return comm


def _journal(run: Run) -> Journal:
    """The journal of a run of several ranks that survives the loss of one."""
    assert isinstance(run.journal, Journal)
    return run.journal


def surviving_comm(lost: RankLost, old_comm: Comm) -> Mpi:
    """The surviving ranks of ``old_comm``. Raises ServerLost on all of them if rank 0 is dead."""
    comm = lost.shrink()
    if comm.members[0] != _require_mpi(old_comm).members[0]:
        raise ServerLost("rank 0, which has the log, has died", reporting_rank=comm.members[0])
    return comm


def _make_plan(run: Run, comm: Mpi, checkpoint_round: int) -> RecoveryPlan:
    """What to do without the dead ranks of ``run``; one message. Raises RankLost on all ranks or
    none.

    Raises Unrecoverable on all when a rank has died together with the one that had its copies.
    """
    old_comm, journal = _require_mpi(run.comm), _journal(run)
    new_rank = {old_comm.members.index(member): rank for rank, member in enumerate(comm.members)}
    table_row = [
        checkpoint_round,
        *_as_pair(journal.kept_rounds()),
        *_as_pair(journal.replica_rounds()),
    ]
    table = np.zeros((old_comm.size, len(table_row)), np.int64)
    table[old_comm.rank] = table_row
    comm.sum(table)  # each row is set by one rank
    comm.agree()
    available_rounds = [{*table[rank, 1:3].tolist()} for rank in new_rank]
    for holder in (
        replica_rank(rank, old_comm.size)
        for rank in range(old_comm.size)
        if rank not in new_rank and run.clients_of(rank)
    ):
        available_rounds.append({*table[holder, 3:].tolist()} if holder in new_rank else set())
    if not (common_rounds := set.intersection(*available_rounds)):
        raise Unrecoverable
    return RecoveryPlan(max(common_rounds), int(table[0, 0]), new_rank)


def _as_pair(rounds: Sequence[int]) -> tuple[int, int]:
    """One or two numbers as two."""
    return rounds[0], rounds[-1]


def _recover_run(
    run: Run,
    comm: Mpi,
    plan: RecoveryPlan,
    workers: Sequence[int],
    route: str,
    rebuild: Callable[[Comm], Run],
) -> tuple[Run, State]:
    """The run on the surviving ranks, and its state; ``run`` stays as it is.

    Raises RankLost on all ranks or none.
    """
    if comm.rank in workers and run.trainer.feed is None:
        comm.heartbeat.enter_stage("the set-up", round_=0)
        recovered = rebuild(comm)
    else:
        # clients of surviving ranks stay
        host = assign_groups(
            run.costs, workers, [plan.new_rank.get(rank) for rank in run.rank_of_group]
        )
        recovered = reassign_groups(run, comm, host, workers, route)
    holder_of_client = {
        c: replica_rank(rank, run.comm.size)
        for c, rank in run.rank_of_client.items()
        if rank not in plan.new_rank
    }
    source_rank = {c: plan.new_rank[holder] for c, holder in holder_of_client.items()}
    journal, restored_round = _journal(run), plan.round
    personal = move_rows(
        recovered,
        source_rank,
        lambda client: journal.replica_row(client, restored_round),
        lambda client: journal.row(client, restored_round),
    )
    state = journal.state(restored_round)._replace(personal=personal)
    if comm.size > 1:
        recovered = recovered.with_fields(journal=Journal(recovered, state))
    comm.agree()
    return recovered, state


def reassign_groups(
    run: Run, comm: Comm, host: Sequence[int], workers: Sequence[int], route: str
) -> Run:
    """``run`` on the ranks of ``comm`` with its groups on the ranks ``host``, without a journal."""
    reassigned = run.with_fields(comm=comm, rank_of_group=tuple(host), journal=None)
    rank_of = [reassigned.rank_of_client[c] for c in range(len(run.kind_of))]
    return reassigned.with_fields(
        mixing=Mixing.of(run.algorithm, run.kinds[0].initial, rank_of, workers, route)
    )


def move_rows(
    run: Run,
    source_rank: dict[int, int],
    replica_row: Callable[[int], Words],
    local_row: Callable[[int], Words],
) -> Tree:
    """The personal leaves of this rank's clients, some of which come from other ranks.

    source_rank: the rank that has the row of each client that moves; replica_row: the row of a
    client that leaves this rank; local_row: the row of one that stays.
    """
    comm = run.comm

    def moving_clients(a, b):
        return [
            c for c in sorted(source_rank) if source_rank[c] == a and run.rank_of_client[c] == b
        ]

    outgoing = [moving_clients(comm.rank, rank) for rank in range(comm.size)]
    incoming = [moving_clients(rank, comm.rank) for rank in range(comm.size)]

    # in float32, which ``exchange`` sends
    def float_count(clients):
        return 2 * sum(row_words(run, c) for c in clients)

    send = np.concatenate(
        [np.empty(0, np.int64), *(replica_row(c) for clients in outgoing for c in clients)]
    )
    words = comm.exchange(
        send.view(np.float32), [*map(float_count, outgoing)], [*map(float_count, incoming)]
    ).view(np.int64)
    moved_rows, personal = (
        split_rows(run, [c for clients in incoming for c in clients], words),
        run.allocate_personal(),
    )
    for client in run.local_clients:
        unpack_row(
            run, moved_rows[client] if client in moved_rows else local_row(client), client, personal
        )
    return personal
