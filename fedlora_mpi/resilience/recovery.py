"""Recovery after a rank failure: which ranks go on, from which round, and which of them take over
the clients of the dead.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config.experiment import Faults
from ..core.scheduling import assign_groups
from ..core.tree import Tree
from ..federation.federation import Federation, State
from ..mpi.comm import Comm, Mpi, Solo
from ..mpi.ending import CollectiveExit, ServerLost, collectively
from ..mpi.pending import RankLost
from ..mpi.watchdog import watch_progress
from .replicas import (
    Journal,
    ReplicatedStore,
    Words,
    replica_rank,
    replicate,
    row_words,
    split_rows,
    unpack_row,
)


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


def with_replicas(federation: Federation, state: State) -> Federation:
    """``federation`` with copies in memory, from which ``recover`` restores a lost rank.

    Raises RankLost on all ranks or none.
    """
    if federation.comm.size == 1:
        return federation
    replicated = replicate(federation, state)
    _require_mpi(federation.comm).agree()
    return replicated


class Training(NamedTuple):
    """Where a run stands between two steps of its loop."""

    federation: Federation
    state: State
    saved_round: int  # the newest round with a checkpoint, as this rank knows it
    is_done: bool = False


class Survival(NamedTuple):
    """What a rank needs to continue without a dead one."""

    workers: Callable[[int], Sequence[int]]  # the ranks that host clients, of so many ranks
    route: str  # of mixes, see ``Mixing.of``
    rebuild: Callable[[Comm], Federation]  # builds it on a rank that had no clients before
    tell: Callable[[str], None]  # receives a line about each recovery


def train_to_end(
    training: Training, advance: Callable[[Training], Training], survival: Survival
) -> State:
    """Call ``advance`` until the run is done; the last state.

    After a rank failure the surviving ranks go back to a round of which their memory holds
    everything. Raises RankLost on all of them if there is none or the rows have no copies, and
    ServerLost on all if rank 0 is dead.
    """
    while not training.is_done:
        try:
            training = advance(training)
        except RankLost as lost:
            if not journal_of(training.federation):
                raise
            training, line = recover(lost, training, survival)
            survival.tell(line)
    return training.state


def begin_round(training: Training) -> None:
    """Copy the rows that the last round has changed to other ranks, if rows have copies.

    Raises RankLost.
    """
    if journal := journal_of(training.federation):
        journal.begin_round(training.state)


def end_run(training: Training) -> None:
    """Wait until all ranks are at the end, if rows have copies. Raises RankLost on all or none."""
    if journal := journal_of(training.federation):
        journal.close()


def recover(lost: RankLost, training: Training, survival: Survival) -> tuple[Training, str]:
    """Where the run stands after ``lost``, and a line about it.

    Raises RankLost on all surviving ranks when their memory holds no complete state, and ServerLost
    on all when rank 0 is dead.
    """
    federation = training.federation
    started, old_comm = time.perf_counter(), _require_mpi(federation.comm)
    while True:
        comm = surviving_comm(lost, old_comm)
        try:
            plan = _make_plan(federation, comm, training.saved_round)
            recovered, state = _recover_run(federation, comm, plan, survival)
            break
        except RankLost as another:
            lost = another  # nothing has changed: try again with fewer ranks
        except Unrecoverable:
            raise RankLost(comm) from None  # although all of these ranks are alive
    dead = [rank for rank in range(old_comm.size) if rank not in plan.new_rank]
    clients = sum(len(federation.placement.clients_of(rank)) for rank in dead)
    seconds = time.perf_counter() - started
    line = recovery_line([old_comm.members[rank] for rank in dead], comm, state.round)
    rounds_replayed = _journal(federation).current.state.round - state.round
    line = (
        f"{line} after {seconds:.2f} s; clients moved: {clients}; finished rounds played again: "
        f"{rounds_replayed}"
    )
    return Training(recovered, state, plan.checkpoint_round), line


def recovery_line(dead: Sequence[int], comm: Comm, round_: int) -> str:
    """The line about ``dead`` ranks of MPI_COMM_WORLD."""
    return f"lost rank {', '.join(map(str, dead))}: {comm.size} ranks go on with round {round_ + 1}"


def _require_mpi(comm: Comm) -> Mpi:
    """``comm``, which has several ranks: only they lose one."""
    assert not isinstance(comm, Solo)
    return comm


def journal_of(federation: Federation) -> Journal | None:
    """The journal of a federation that survives the loss of a rank."""
    return federation.store.journal if isinstance(federation.store, ReplicatedStore) else None


def _journal(federation: Federation) -> Journal:
    journal = journal_of(federation)
    assert journal
    return journal


def surviving_comm(lost: RankLost, old_comm: Comm) -> Mpi:
    """The surviving ranks of ``old_comm``. Raises ServerLost on all of them if rank 0 is dead."""
    comm = lost.shrink()
    if comm.members[0] != _require_mpi(old_comm).members[0]:
        raise ServerLost("rank 0, which has the log, has died", reporting_rank=comm.members[0])
    return comm


def _make_plan(federation: Federation, comm: Mpi, checkpoint_round: int) -> RecoveryPlan:
    """What to do without the dead ranks of ``federation``; one message.

    Raises RankLost on all ranks or none.

    Raises Unrecoverable on all when a rank has died together with the one that had its copies.
    """
    old_comm, journal = _require_mpi(federation.comm), _journal(federation)
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
        if rank not in new_rank and federation.placement.clients_of(rank)
    ):
        available_rounds.append({*table[holder, 3:].tolist()} if holder in new_rank else set())
    if not (common_rounds := set.intersection(*available_rounds)):
        raise Unrecoverable
    return RecoveryPlan(max(common_rounds), int(table[0, 0]), new_rank)


def _as_pair(rounds: Sequence[int]) -> tuple[int, int]:
    """One or two numbers as two."""
    return rounds[0], rounds[-1]


def _recover_run(
    federation: Federation, comm: Mpi, plan: RecoveryPlan, survival: Survival
) -> tuple[Federation, State]:
    """The federation on the surviving ranks, and its state; ``federation`` stays as it is.

    Raises RankLost on all ranks or none.
    """
    workers = survival.workers(comm.size)
    if comm.rank in workers and federation.clients.trainer.feed is None:
        comm.heartbeat.enter_stage("the set-up", round_=0)
        recovered = survival.rebuild(comm)
    else:
        # clients of surviving ranks stay
        former_hosts = federation.placement.rank_of_group
        hosts = assign_groups(
            federation.placement.costs, workers, [plan.new_rank.get(rank) for rank in former_hosts]
        )
        recovered = federation.on_ranks(comm, hosts, workers, survival.route)
    holder_of_client = {
        c: replica_rank(rank, federation.comm.size)
        for c, rank in federation.placement.rank_of_client.items()
        if rank not in plan.new_rank
    }
    source_rank = {c: plan.new_rank[holder] for c, holder in holder_of_client.items()}
    journal, restored_round = _journal(federation), plan.round
    personal = move_rows(
        recovered,
        source_rank,
        lambda client: journal.replica_row(client, restored_round),
        lambda client: journal.row(client, restored_round),
    )
    state = journal.state(restored_round)._replace(personal=personal)
    if comm.size > 1:
        recovered = replicate(recovered, state)
    comm.agree()
    return recovered, state


def move_rows(
    federation: Federation,
    source_rank: dict[int, int],
    replica_row: Callable[[int], Words],
    local_row: Callable[[int], Words],
) -> Tree:
    """The personal leaves of this rank's clients, some of which come from other ranks.

    source_rank: the rank that has the row of each client that moves; replica_row: the row of a
    client that leaves this rank; local_row: the row of one that stays.
    """
    comm = federation.comm

    def moving_clients(a, b):
        return [
            c
            for c in sorted(source_rank)
            if source_rank[c] == a and federation.placement.rank_of_client[c] == b
        ]

    outgoing = [moving_clients(comm.rank, rank) for rank in range(comm.size)]
    incoming = [moving_clients(rank, comm.rank) for rank in range(comm.size)]

    # in float32, which ``exchange`` sends
    def float_count(clients):
        return 2 * sum(row_words(federation, c) for c in clients)

    send = np.concatenate(
        [np.empty(0, np.int64), *(replica_row(c) for clients in outgoing for c in clients)]
    )
    words = comm.exchange(
        send.view(np.float32), [*map(float_count, outgoing)], [*map(float_count, incoming)]
    ).view(np.int64)
    moved_rows, personal = (
        split_rows(federation, [c for clients in incoming for c in clients], words),
        federation.store.allocate(),
    )
    for client in federation.placement.local_clients:
        unpack_row(
            federation,
            moved_rows[client] if client in moved_rows else local_row(client),
            client,
            personal,
        )
    return personal
