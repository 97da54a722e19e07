"""Ranks in this process, each a thread, that die at chosen moments: every verb of ``comm.Mpi``, and
what MPI leaves open.

A moment is before and after each message, agreement, shrinking and copy of a rank. Where a rank has
died, a message that it has still sent reaches some of the others and not the rest, and a copy on
its way may or may not arrive: ``Fate`` draws.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedlora_mpi.mpi.heartbeat import Pulse
from fedlora_mpi.mpi.pending import Lost


class Killed(BaseException):
    """SIGKILL."""


class Fate:
    """Who dies when, and how what is left open turns out. One thread runs at a time, the one that
    holds ``turn``.
    """

    def __init__(self, deaths, seed=0):
        self.turn, self.dead, self._deaths = threading.Condition(), set(), dict(deaths)
        self._draw, self.count = random.Random(seed), {}

    def moment(self, member):
        self.count[member] = self.count.get(member, 0) + 1
        if self._deaths.get(member) == self.count[member]:
            raise Killed

    def kind(self):
        return self._draw.random() < 0.5

    def wait(self, fact):
        assert self.turn.wait_for(fact, 60), "for ever"


class Channel:
    """A communicator: what its members have put into each message, agreement and shrinking, by
    number.
    """

    def __init__(self, members):
        self.members, self.revoked = members, False
        self.put, self.flags, self.agreed, self.left, self.next, self.mail = (
            {},
            {},
            {},
            set(),
            None,
            {},
        )


class MortalRank:
    tolerant = True

    def __init__(self, fate, channel, member, pulse=None):
        self._fate, self._channel, self._member = fate, channel, member
        self.members, self.rank, self.size = (
            channel.members,
            channel.members.index(member),
            len(channel.members),
        )
        self.local_rank, self.local_size, self.moved = self.rank, self.size, 0
        self.dead = tuple(m for m in range(max(channel.members) + 1) if m not in channel.members)
        self.pulse, self._messages, self._agreements, self._posts = pulse or Pulse(), 0, 0, 0

    def sum(self, buffer):
        buffer[...] = np.sum(list(self._swap(buffer.copy())), axis=0)

    def broadcast(self, data):
        return self._swap(data)[0]

    def gather(self, send, counts):
        return np.concatenate(self._swap(send))

    def exchange(self, send, counts, arriving):
        given = self._swap((send, list(counts)))
        parts = [np.split(mine, np.cumsum(to)[:-1])[self.rank] for mine, to in given]
        assert [len(part) for part in parts] == list(arriving)
        return np.concatenate(parts)

    def post(self, send, to, receive, of):
        self._fate.moment(self._member)
        self._posts += 1
        self._channel.mail[self.rank, to, self._posts] = send.copy()
        mail = MortalMail(self, (of, self.rank, self._posts), receive)
        self._fate.turn.notify_all()
        self._fate.moment(self._member)
        return mail

    def agree(self):
        if not self._agreed(True):
            raise Lost(self, agreed=True)

    def without_the_dead(self, agreed):
        if not agreed:
            self._agreed(False)
        self._fate.moment(self._member)
        channel, fate = self._channel, self._fate
        channel.left.add(self._member)
        fate.turn.notify_all()
        fate.wait(lambda: channel.next or channel.left | fate.dead >= {*channel.members})
        if not channel.next:
            channel.next = Channel(tuple(m for m in channel.members if m not in fate.dead))
        return MortalRank(fate, channel.next, self._member, self.pulse)

    def abort(self):
        raise AssertionError("aborted")

    def lost(self):
        self._channel.revoked = True
        self._fate.turn.notify_all()
        return Lost(self)

    def gone(self, members):
        """Whether nothing more can come of these."""
        return self._channel.revoked or bool(self._fate.dead & {*members})

    def _agreed(self, well):
        self._fate.moment(self._member)
        self._agreements += 1
        number, channel, fate = self._agreements, self._channel, self._fate
        flags = channel.flags.setdefault(number, {})
        flags[self._member] = well
        fate.turn.notify_all()
        fate.wait(
            lambda: number in channel.agreed or flags.keys() | fate.dead >= {*channel.members}
        )
        if number not in channel.agreed:
            channel.agreed[number] = all(
                flags.get(m) and m not in fate.dead for m in channel.members
            )
        fate.moment(self._member)
        return channel.agreed[number]

    def _swap(self, mine):
        """What every rank gave, in rank order."""
        self._fate.moment(self._member)
        self._messages += 1
        channel, fate = self._channel, self._fate
        put = channel.put.setdefault(self._messages, {})
        put[self._member] = mine
        fate.turn.notify_all()
        fate.moment(self._member)
        fate.wait(lambda: len(put) == self.size or self.gone({*channel.members} - put.keys()))
        if len(put) < self.size or (self.gone(channel.members) and fate.kind()):
            raise self.lost()
        fate.moment(self._member)
        return [put[m] for m in channel.members]


class MortalMail:
    def __init__(self, comm, key, receive):
        self._comm, self._key, self._receive, self._here, self._failed = (
            comm,
            key,
            receive,
            False,
            False,
        )

    def through(self):
        if self._comm._channel.revoked or self._failed:
            raise self._comm.lost()
        sent, sender = self._comm._channel.mail, self._comm.members[self._key[0]]
        if (
            not self._here
            and sender in self._comm._fate.dead
            and (self._key not in sent or self._comm._fate.kind())
        ):
            self._failed = True
            raise self._comm.lost()
        if not self._here and self._key in sent and self._comm._fate.kind():
            self._receive[...] = sent[self._key]
            self._here = True
        return self._here

    def arrive(self):
        while not self.through():
            self._comm._fate.turn.wait(0.001)

    def arrived(self):
        if (
            not self._here
            and not self._failed
            and self._key in self._comm._channel.mail
            and self._comm._fate.kind()
        ):
            self._receive[...] = self._comm._channel.mail[self._key]
            self._here = True
        self._failed = True
        return self._here


def on_mortal_ranks(number, main, deaths, seed=0):
    """([main(comm) of each rank, None of a dead one], Fate); the first exception is raised."""
    fate, channel = Fate(deaths, seed), Channel(tuple(range(number)))

    def play(member):
        with fate.turn:
            try:
                return main(MortalRank(fate, channel, member))
            except Killed:
                return None
            finally:
                fate.dead.add(member)  # also one that has ended: nobody can count on it
                fate.turn.notify_all()

    with ThreadPoolExecutor(number) as pool:
        ends = [pool.submit(play, member) for member in range(number)]
    return [end.result() for end in ends], fate
