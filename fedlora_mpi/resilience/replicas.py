"""Copies that ranks keep in memory, so that a run survives the loss of one of them.

A round writes rows of personal leaves in place. Each rank saves a row before its first write of a
round, and keeps it until all ranks are past the first message of the NEXT round. Each rank also
sends the rows that a round has changed to the rank after it, which has received them before that
message. So at any moment all surviving ranks can go back to the same round, the present one or the
one before, with the rows of the lost rank.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from ..core.tree import Tree
from ..federation.client_store import ClientStore
from ..federation.federation import Federation, State
from ..mpi.comm import Solo
from ..mpi.pending import PendingMessage

# int64 [n]: the bytes of a client's personal leaves; each leaf begins at a whole word
Words = np.ndarray


class UndoLog(NamedTuple):
    """A state and the former values of its rows that were overwritten."""

    state: State
    rows: dict[int, Words]


class IncomingRows(NamedTuple):
    """Rows on their way to this rank."""

    round: int  # of the state that they belong to
    clients: tuple[int, ...]
    words: Words
    message: PendingMessage


class Journal:
    """The ``current`` state of one rank, the one before, and the rows of the rank before this one,
    which it protects.
    """

    def __init__(self, federation: Federation, state: State) -> None:
        """Copy all rows; every rank calls it and waits for the others. Raises RankLost."""
        assert not isinstance(federation.comm, Solo)
        self._federation, self._comm = federation, federation.comm
        self.current = UndoLog(state, {})
        self._previous: UndoLog | None = None
        self._replicas: dict[int, Words] = {}
        self._replica_round = -1
        self._incoming: IncomingRows | None = None
        self._send_replicas(range(len(federation.clients)))
        self.wait()
        self.commit()

    def save_undo(self, client: int) -> None:
        """Save the row of ``client``, which is about to be written."""
        if client not in self.current.rows:
            self.current.rows[client] = pack_row(
                self._federation, self.current.state.personal, client
            )

    def begin_round(self, state: State) -> None:
        """Begin a round from ``state``, and begin to send the rows that the last cohort changed.

        Raises RankLost.
        """
        self.current, self._previous = UndoLog(state, {}), self.current
        self._send_replicas(self._federation.cohorts.sample(state.round - 1).members)

    def progress(self) -> None:
        """Let the messages progress, between two pieces of work.

        Raises RankLost as soon as any rank has noticed a dead one.
        """
        if self._incoming:
            self._incoming.message.is_complete()

    def wait(self) -> None:
        """Wait for the rows, before the first message of a round. Raises RankLost."""
        if self._incoming:
            self._incoming.message.wait()

    def commit(self) -> None:
        """Forget the round before: the first message is complete, so all ranks have all rows."""
        if self._incoming:
            for client, words in split_rows(
                self._federation, self._incoming.clients, self._incoming.words
            ).items():
                self._replicas.setdefault(client, np.empty_like(words))[:] = words
            self._replica_round, self._incoming, self._previous = self._incoming.round, None, None

    def all_reduce(self, buffer: np.ndarray) -> None:
        """A sum of a round; the first waits for the copies. Raises RankLost."""
        self.wait()
        self._comm.sum(buffer)
        self.commit()

    def close(self) -> None:
        """Wait until all ranks are at the end, as a rank that leaves could still be needed.

        Raises RankLost on all ranks or none.
        """
        self.wait()
        self._comm.agree()

    def kept_rounds(self) -> list[int]:
        """The rounds to which this rank can go back, newest first."""
        return [undo_log.state.round for undo_log in (self.current, self._previous) if undo_log]

    def replica_rounds(self) -> list[int]:
        """The rounds of which it has the rows of the rank before it, newest first."""
        incoming_rounds: list[int] = (
            [self._incoming.round]
            if self._incoming and self._incoming.message.is_received()
            else []
        )
        return [*incoming_rounds, self._replica_round]

    def state(self, round_: int) -> State:
        """The state of that round; ``row`` has its personal rows."""
        return next(
            undo_log.state
            for undo_log in (self.current, self._previous)
            if undo_log and undo_log.state.round == round_
        )

    def row(self, client: int, round_: int) -> Words:
        """A row of this rank at that round."""
        older_rows: dict[int, Words] = (
            self._previous.rows if self._previous and round_ < self.current.state.round else {}
        )
        words = older_rows.get(client, self.current.rows.get(client))
        return (
            pack_row(self._federation, self.current.state.personal, client)
            if words is None
            else words
        )

    def replica_row(self, client: int, round_: int) -> Words:
        """A row of the rank before this one at that round."""
        newer_rows: dict[int, Words] = {}
        if round_ > self._replica_round:
            assert self._incoming is not None
            newer_rows = split_rows(self._federation, self._incoming.clients, self._incoming.words)
        return newer_rows[client] if client in newer_rows else self._replicas[client]

    def _send_replicas(self, changed: Collection[int]) -> None:
        """Begin to send the rows of ``changed`` clients to the next rank, and to receive those of
        the rank before.
        """
        federation, comm = self._federation, self._comm
        protected_rank = (comm.rank - 1) % comm.size
        local_clients, protected_clients = (
            tuple(c for c in federation.placement.clients_of(rank) if c in changed)
            for rank in (comm.rank, protected_rank)
        )
        state = self.current.state
        words = np.concatenate(
            [
                np.empty(0, np.int64),
                *(pack_row(federation, state.personal, c) for c in local_clients),
            ]
        )
        received = np.empty(sum(row_words(federation, c) for c in protected_clients), np.int64)
        message = comm.post(words, replica_rank(comm.rank, comm.size), received, protected_rank)
        self._incoming = IncomingRows(state.round, protected_clients, received, message)


@dataclass(frozen=True)
class ReplicatedStore(ClientStore):
    """A store whose rows can be restored: it saves each row before it overwrites it."""

    journal: Journal = field(kw_only=True)

    def write(self, personal: Tree, client: int, leaves: Tree) -> None:
        """Raises RankLost as soon as any rank has noticed a dead one."""
        self.journal.progress()
        self.journal.save_undo(client)
        super().write(personal, client, leaves)


def replicate(federation: Federation, state: State) -> Federation:
    """``federation`` with copies of its personal rows on other ranks. Raises RankLost."""
    journal, store = Journal(federation, state), federation.store
    return replace(
        federation,
        store=ReplicatedStore(store.clients, store.placement, store.rows, journal=journal),
        aggregator=replace(federation.aggregator, all_reduce=journal.all_reduce),
    )


def replica_rank(rank: int, ranks: int) -> int:
    """The rank that keeps the copies of ``rank``: the next one; after the last, the first."""
    return (rank + 1) % ranks


def pack_row(federation: Federation, personal: Tree, client: int) -> Words:
    """A copy of the bytes of a client's personal leaves."""
    kind, row = federation.clients[client], federation.placement.row_of_client[client]
    words = np.zeros(row_words(federation, client), np.int64)
    parts = _leaf_views(federation, client, words)
    for name in kind.initial.personal:
        parts[name].copy_(personal[kind.prefix + name][row])
    return words


def unpack_row(federation: Federation, words: Words, client: int, personal: Tree) -> None:
    """Write a client's personal leaves into its row of ``personal``."""
    prefix, row = federation.clients[client].prefix, federation.placement.row_of_client[client]
    for name, value in _leaf_views(federation, client, words).items():
        personal[prefix + name][row] = value


def row_words(federation: Federation, client: int) -> int:
    """Words of a client's personal leaves."""
    return sum(
        -(-v.numel() * v.element_size() // 8)
        for v in federation.clients[client].initial.personal.values()
    )


def _leaf_views(federation: Federation, client: int, words: Words) -> Tree:
    """The leaves as views into ``words``."""
    parts, offset, flat = {}, 0, torch.from_numpy(words)
    for name, like in federation.clients[client].initial.personal.items():
        end = offset - (-like.numel() * like.element_size() // 8)
        parts[name] = flat[offset:end].view(like.dtype)[: like.numel()].view(like.shape)
        offset = end
    return parts


def split_rows(federation: Federation, clients: Sequence[int], words: Words) -> dict[int, Words]:
    """The row of each client, a view of the ``words`` of all."""
    ends = np.cumsum([row_words(federation, c) for c in clients])
    return dict(zip(clients, np.split(words, ends[:-1]), strict=True)) if clients else {}
