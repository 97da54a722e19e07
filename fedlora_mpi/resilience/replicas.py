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
from ..mpi.pending import Mail

# int64 [n]: the bytes of a client's personal leaves, each leaf from a whole word on
Words = np.ndarray


class Past(NamedTuple):
    """A state whose rows have been written over, and those rows."""

    state: State
    rows: dict[int, Words]


class Coming(NamedTuple):
    """Rows on their way to this rank."""

    round: int  # of the state that they belong to
    clients: tuple[int, ...]
    words: Words
    mail: Mail


class Journal:
    """Of one rank: its ``present`` state, the one before, and the rows of its ward, which is the
    rank before it.
    """

    def __init__(self, run: Run, state: State) -> None:
        """Copy all rows; every rank calls it and waits for the others. Raises Lost."""
        self._run, self.present, self._before = run, Past(state, {}), None
        self._held, self._held_round, self._coming = {}, -1, None
        self._send(range(len(run.kind_of)))
        self.settle()
        self.settled()

    def note(self, client: int) -> None:
        """The row of ``client`` is about to be written."""
        if client not in self.present.rows:
            self.present.rows[client] = packed(self._run, self.present.state.personal, client)

    def turn(self, state: State) -> None:
        """A round is played: ``state`` is the present one; what the cohort has changed begins to
        travel. Raises Lost.
        """
        self.present, self._before = Past(state, {}), self.present
        self._send(self._run.chosen(state.round - 1))

    def poke(self) -> None:
        """Move on what travels, between two pieces of work. Raises Lost as soon as another rank has
        met a dead one.
        """
        if self._coming:
            self._coming.mail.through()

    def settle(self) -> None:
        """Wait for what travels: before the first message of a round. Raises Lost."""
        if self._coming:
            self._coming.mail.arrive()

    def settled(self) -> None:
        """That message is through, so on all ranks everything has arrived: nobody goes back to the
        round before.
        """
        if self._coming:
            for client, words in split(self._run, self._coming.clients, self._coming.words).items():
                self._held.setdefault(client, np.empty_like(words))[:] = words
            self._held_round, self._coming, self._before = self._coming.round, None, None

    def close(self) -> None:
        """The run is over on all ranks, lest some leave and others need them. Raises Lost on all or
        none.
        """
        self.settle()
        self._run.comm.agree()

    def states(self) -> list[int]:
        """The rounds to which this rank can go back, newest first."""
        return [past.state.round for past in (self.present, self._before) if past]

    def copies(self) -> list[int]:
        """The rounds of which it has the rows of its ward, newest first."""
        newer = [self._coming.round] if self._coming and self._coming.mail.arrived() else []
        return [*newer, self._held_round]

    def state(self, round_: int) -> State:
        """The state of that round; its personal rows by ``row``."""
        return next(
            past.state
            for past in (self.present, self._before)
            if past and past.state.round == round_
        )

    def row(self, client: int, round_: int) -> Words:
        """A row of this rank's at that round."""
        older = self._before.rows if self._before and round_ < self.present.state.round else {}
        found = older.get(client, self.present.rows.get(client))
        return packed(self._run, self.present.state.personal, client) if found is None else found

    def copy(self, client: int, round_: int) -> Words:
        """A row of its ward's at that round."""
        newer = (
            split(self._run, self._coming.clients, self._coming.words)
            if round_ > self._held_round
            else {}
        )
        return newer.get(client, self._held.get(client))

    def _send(self, changed: Collection[int]) -> None:
        """The rows of ``changed`` clients set out to the next rank, and those of the rank before
        this one.
        """
        run, comm = self._run, self._run.comm
        ward = (comm.rank - 1) % comm.size
        mine, its = (
            tuple(c for c in run.clients_of(rank) if c in changed) for rank in (comm.rank, ward)
        )
        state = self.present.state
        words = np.concatenate(
            [np.empty(0, np.int64), *(packed(run, state.personal, c) for c in mine)]
        )
        arriving = np.empty(sum(size(run, c) for c in its), np.int64)
        mail = comm.post(words, guard(comm.rank, comm.size), arriving, ward)
        self._coming = Coming(state.round, its, arriving, mail)


def guard(rank: int, ranks: int) -> int:
    """The rank that keeps the copies of ``rank``: the next one, after the last the first."""
    return (rank + 1) % ranks


def packed(run: Run, personal: Tree, client: int) -> Words:
    """A copy of a client's personal leaves, their bytes as they are."""
    kind, row = run.kinds[run.kind_of[client]], run.row_of[client]
    words = np.zeros(size(run, client), np.int64)
    parts = _parts(run, client, words)
    for name in kind.first.personal:
        parts[name].copy_(personal[kind.prefix + name][row])
    return words


def unpack(run: Run, words: Words, client: int, personal: Tree) -> None:
    """Write a client's personal leaves into its row of ``personal``."""
    prefix, row = run.kinds[run.kind_of[client]].prefix, run.row_of[client]
    for name, value in _parts(run, client, words).items():
        personal[prefix + name][row] = value


def size(run: Run, client: int) -> int:
    """Words of a client's personal leaves."""
    return sum(
        -(-v.numel() * v.element_size() // 8)
        for v in run.kinds[run.kind_of[client]].first.personal.values()
    )


def _parts(run: Run, client: int, words: Words) -> Tree:
    """The leaves as views into ``words``."""
    parts, at, flat = {}, 0, torch.from_numpy(words)
    for name, like in run.kinds[run.kind_of[client]].first.personal.items():
        last = at - (-like.numel() * like.element_size() // 8)
        parts[name] = flat[at:last].view(like.dtype)[: like.numel()].view(like.shape)
        at = last
    return parts


def split(run: Run, clients: Sequence[int], words: Words) -> dict[int, Words]:
    """The row of each client, a view of the ``words`` of all."""
    ends = np.cumsum([size(run, c) for c in clients])
    return dict(zip(clients, np.split(words, ends[:-1]), strict=True)) if clients else {}
