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

from fedlora_mpi.mpi.heartbeat import Heartbeat
from fedlora_mpi.mpi.pending import RankLost


class Killed(BaseException):
    """SIGKILL."""


class DeathSchedule:
    """Who dies when, and how what is left open turns out. One thread runs at a time, the one that
    holds ``turn``.
    """

    def __init__(self, deaths, seed=0):
        self.baton, self.dead, self._deaths = threading.Condition(), set(), dict(deaths)
        self._random, self.moments_of = random.Random(seed), {}

    def reach_moment(self, member):
        self.moments_of[member] = self.moments_of.get(member, 0) + 1
        if self._deaths.get(member) == self.moments_of[member]:
            raise Killed

    def flip_coin(self):
        return self._random.random() < 0.5

    def wait_until(self, condition):
        assert self.baton.wait_for(condition, 60), "for ever"


class Channel:
    """A communicator: what its members have put into each message, agreement and shrinking, by
    number.
    """

    def __init__(self, members):
        self.members, self.revoked = members, False
        self.messages, self.flags, self.agreements, self.leaving, self.successor, self.copies = (
            {},
            {},
            {},
            set(),
            None,
            {},
        )


class MortalRank:
    is_tolerant = True

    def __init__(self, fate, channel, member, heartbeat=None):
        self._fate, self._channel, self._member = fate, channel, member
        self.members, self.rank, self.size = (
            channel.members,
            channel.members.index(member),
            len(channel.members),
        )
        self.local_rank, self.local_size, self.bytes_sent = self.rank, self.size, 0
        self.dead_ranks = tuple(
            m for m in range(max(channel.members) + 1) if m not in channel.members
        )
        self.heartbeat, self._num_messages, self._num_agreements, self._num_posts = (
            heartbeat or Heartbeat(),
            0,
            0,
            0,
        )

    def sum(self, buffer):
        buffer[...] = np.sum(list(self._allgather(buffer.copy())), axis=0)

    def broadcast(self, data):
        return self._allgather(data)[0]

    def gather(self, send, counts):
        return np.concatenate(self._allgather(send))

    def exchange(self, send, counts, receive_counts):
        sent = self._allgather((send, list(counts)))
        parts = [
            np.split(buffer, np.cumsum(split_sizes)[:-1])[self.rank] for buffer, split_sizes in sent
        ]
        assert [len(part) for part in parts] == list(receive_counts)
        return np.concatenate(parts)

    def post(self, send, destination, receive, source):
        self._fate.reach_moment(self._member)
        self._num_posts += 1
        self._channel.copies[self.rank, destination, self._num_posts] = send.copy()
        message = MortalMail(self, (source, self.rank, self._num_posts), receive)
        self._fate.baton.notify_all()
        self._fate.reach_moment(self._member)
        return message

    def agree(self):
        if not self._all_agree(True):
            raise RankLost(self, has_agreed=True)

    def shrink(self, has_agreed):
        if not has_agreed:
            self._all_agree(False)
        self._fate.reach_moment(self._member)
        channel, fate = self._channel, self._fate
        channel.leaving.add(self._member)
        fate.baton.notify_all()
        fate.wait_until(
            lambda: channel.successor or channel.leaving | fate.dead >= {*channel.members}
        )
        if not channel.successor:
            channel.successor = Channel(tuple(m for m in channel.members if m not in fate.dead))
        return MortalRank(fate, channel.successor, self._member, self.heartbeat)

    def abort(self):
        raise AssertionError("aborted")

    def lost(self):
        self._channel.revoked = True
        self._fate.baton.notify_all()
        return RankLost(self)

    def are_gone(self, members):
        """Whether nothing more can come of these."""
        return self._channel.revoked or bool(self._fate.dead & {*members})

    def _all_agree(self, is_well):
        self._fate.reach_moment(self._member)
        self._num_agreements += 1
        number, channel, fate = self._num_agreements, self._channel, self._fate
        flags = channel.flags.setdefault(number, {})
        flags[self._member] = is_well
        fate.baton.notify_all()
        fate.wait_until(
            lambda: number in channel.agreements or flags.keys() | fate.dead >= {*channel.members}
        )
        if number not in channel.agreements:
            channel.agreements[number] = all(
                flags.get(m) and m not in fate.dead for m in channel.members
            )
        fate.reach_moment(self._member)
        return channel.agreements[number]

    def _allgather(self, value):
        """What every rank gave, in rank order."""
        self._fate.reach_moment(self._member)
        self._num_messages += 1
        channel, fate = self._channel, self._fate
        values = channel.messages.setdefault(self._num_messages, {})
        values[self._member] = value
        fate.baton.notify_all()
        fate.reach_moment(self._member)
        fate.wait_until(
            lambda: len(values) == self.size or self.are_gone({*channel.members} - values.keys())
        )
        if len(values) < self.size or (self.are_gone(channel.members) and fate.flip_coin()):
            raise self.lost()
        fate.reach_moment(self._member)
        return [values[m] for m in channel.members]


class MortalMail:
    def __init__(self, comm, key, receive):
        self._comm, self._key, self._receive, self._has_arrived, self._has_failed = (
            comm,
            key,
            receive,
            False,
            False,
        )

    def is_complete(self):
        if self._comm._channel.revoked or self._has_failed:
            raise self._comm.lost()
        sent, sender = self._comm._channel.copies, self._comm.members[self._key[0]]
        if (
            not self._has_arrived
            and sender in self._comm._fate.dead
            and (self._key not in sent or self._comm._fate.flip_coin())
        ):
            self._has_failed = True
            raise self._comm.lost()
        if not self._has_arrived and self._key in sent and self._comm._fate.flip_coin():
            self._receive[...] = sent[self._key]
            self._has_arrived = True
        return self._has_arrived

    def wait(self):
        while not self.is_complete():
            self._comm._fate.baton.wait(0.001)

    def is_received(self):
        if (
            not self._has_arrived
            and not self._has_failed
            and self._key in self._comm._channel.copies
            and self._comm._fate.flip_coin()
        ):
            self._receive[...] = self._comm._channel.copies[self._key]
            self._has_arrived = True
        self._has_failed = True
        return self._has_arrived


def run_on_mortal_ranks(number, main, deaths, seed=0):
    """([main(comm) of each rank, None of a dead one], Fate); the first exception is raised."""
    fate, channel = DeathSchedule(deaths, seed), Channel(tuple(range(number)))

    def run_member(member):
        with fate.baton:
            try:
                return main(MortalRank(fate, channel, member))
            except Killed:
                return None
            finally:
                fate.dead.add(member)  # also one that has ended: nobody can count on it
                fate.baton.notify_all()

    with ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(run_member, member) for member in range(number)]
    return [future.result() for future in futures], fate
