"""What ranks keep in memory so that a run outlives one of them: rows as they were, and copies for
each other.

The rows of personal leaves are written in place while a round is played. A rank notes each row
before its first write of a round, and keeps the notes until all ranks are past the first message of
the NEXT round; and it sends the rows that a round has changed to the rank after it, which is
through with them before that message. So at any moment all ranks that are left can go back to one
and the same round, the present one or the one before, with the rows of the dead.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..core.tree import Tree
from ..federation.federation import Run, State
from ..mpi.pending import PendingMessage

# int64 [n]: the bytes of a client's personal leaves, each leaf from a whole word on
Words = np.ndarray


class UndoLog(NamedTuple):
    """A state whose rows have been written over, and those rows."""

    state: State
    rows: dict[int, Words]


class IncomingRows(NamedTuple):
    """Rows on their way to this rank."""

    round: int  # of the state that they belong to
    clients: tuple[int, ...]
    words: Words
    message: PendingMessage


class Journal:
    """Of one rank: its ``present`` state, the one before, and the rows of its ward, which is the
    rank before it.
    """

    def __init__(self, run: Run, state: State) -> None:
        """Copy all rows; every rank calls it and waits for the others. Raises Lost."""
        self._run, self.current, self._previous = run, UndoLog(state, {}), None
        self._replicas, self._replica_round, self._incoming = {}, -1, None
        self._send_replicas(range(len(run.kind_of)))
        self.wait()
        self.commit()

    def save_undo(self, client: int) -> None:
        """The row of ``client`` is about to be written."""
        if client not in self.current.rows:
            self.current.rows[client] = pack_row(self._run, self.current.state.personal, client)

    def begin_round(self, state: State) -> None:
        """A round is played: ``state`` is the present one; what the cohort has changed begins to
        travel. Raises Lost.
        """
        self.current, self._previous = UndoLog(state, {}), self.current
        self._send_replicas(self._run.sample_cohort(state.round - 1))

    def progress(self) -> None:
        """Move on what travels, between two pieces of work. Raises Lost as soon as another rank has
        met a dead one.
        """
        if self._incoming:
            self._incoming.message.is_complete()

    def wait(self) -> None:
        """Wait for what travels: before the first message of a round. Raises Lost."""
        if self._incoming:
            self._incoming.message.wait()

    def commit(self) -> None:
        """That message is through, so on all ranks everything has arrived: nobody goes back to the
        round before.
        """
        if self._incoming:
            for client, words in split_rows(
                self._run, self._incoming.clients, self._incoming.words
            ).items():
                self._replicas.setdefault(client, np.empty_like(words))[:] = words
            self._replica_round, self._incoming, self._previous = self._incoming.round, None, None

    def close(self) -> None:
        """The run is over on all ranks, lest some leave and others need them. Raises Lost on all or
        none.
        """
        self.wait()
        self._run.comm.agree()

    def kept_rounds(self) -> list[int]:
        """The rounds to which this rank can go back, newest first."""
        return [undo_log.state.round for undo_log in (self.current, self._previous) if undo_log]

    def replica_rounds(self) -> list[int]:
        """The rounds of which it has the rows of its ward, newest first."""
        incoming_rounds = (
            [self._incoming.round]
            if self._incoming and self._incoming.message.is_received()
            else []
        )
        return [*incoming_rounds, self._replica_round]

    def state(self, round_: int) -> State:
        """The state of that round; its personal rows by ``row``."""
        return next(
            undo_log.state
            for undo_log in (self.current, self._previous)
            if undo_log and undo_log.state.round == round_
        )

    def row(self, client: int, round_: int) -> Words:
        """A row of this rank's at that round."""
        older_rows = (
            self._previous.rows if self._previous and round_ < self.current.state.round else {}
        )
        words = older_rows.get(client, self.current.rows.get(client))
        return pack_row(self._run, self.current.state.personal, client) if words is None else words

    def replica_row(self, client: int, round_: int) -> Words:
        """A row of its ward's at that round."""
        newer_rows = (
            split_rows(self._run, self._incoming.clients, self._incoming.words)
            if round_ > self._replica_round
            else {}
        )
        return newer_rows.get(client, self._replicas.get(client))

    def _send_replicas(self, changed: Collection[int]) -> None:
        """The rows of ``changed`` clients set out to the next rank, and those of the rank before
        this one.
        """
        run, comm = self._run, self._run.comm
        protected_rank = (comm.rank - 1) % comm.size
        local_clients, protected_clients = (
            tuple(c for c in run.clients_of(rank) if c in changed)
            for rank in (comm.rank, protected_rank)
        )
        state = self.current.state
        words = np.concatenate(
            [np.empty(0, np.int64), *(pack_row(run, state.personal, c) for c in local_clients)]
        )
        received = np.empty(sum(row_words(run, c) for c in protected_clients), np.int64)
        message = comm.post(words, replica_rank(comm.rank, comm.size), received, protected_rank)
        self._incoming = IncomingRows(state.round, protected_clients, received, message)


def replica_rank(rank: int, ranks: int) -> int:
    """The rank that keeps the copies of ``rank``: the next one, after the last the first."""
    return (rank + 1) % ranks


def pack_row(run: Run, personal: Tree, client: int) -> Words:
    """A copy of a client's personal leaves, their bytes as they are."""
    kind, row = run.kinds[run.kind_of[client]], run.row_of_client[client]
    words = np.zeros(row_words(run, client), np.int64)
    parts = _leaf_views(run, client, words)
    for name in kind.initial.personal:
        parts[name].copy_(personal[kind.prefix + name][row])
    return words


def unpack_row(run: Run, words: Words, client: int, personal: Tree) -> None:
    """Write a client's personal leaves into its row of ``personal``."""
    prefix, row = run.kinds[run.kind_of[client]].prefix, run.row_of_client[client]
    for name, value in _leaf_views(run, client, words).items():
        personal[prefix + name][row] = value


def row_words(run: Run, client: int) -> int:
    """Words of a client's personal leaves."""
    return sum(
        -(-v.numel() * v.element_size() // 8)
        for v in run.kinds[run.kind_of[client]].initial.personal.values()
    )


def _leaf_views(run: Run, client: int, words: Words) -> Tree:
    """The leaves as views into ``words``."""
    parts, offset, flat = {}, 0, torch.from_numpy(words)
    for name, like in run.kinds[run.kind_of[client]].initial.personal.items():
        end = offset - (-like.numel() * like.element_size() // 8)
        parts[name] = flat[offset:end].view(like.dtype)[: like.numel()].view(like.shape)
        offset = end
    return parts


def split_rows(run: Run, clients: Sequence[int], words: Words) -> dict[int, Words]:
    """The row of each client, a view of the ``words`` of all."""
    ends = np.cumsum([row_words(run, c) for c in clients])
    return dict(zip(clients, np.split(words, ends[:-1]), strict=True)) if clients else {}
