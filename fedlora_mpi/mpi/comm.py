"""The only file that sends messages between ranks. Each message is one flat buffer.

``connect()`` returns the communicator of this process: ``Mpi`` under a launcher, otherwise
``Solo``, which needs no MPI library.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import numpy as np

from .heartbeat import Heartbeat
from .launch import expected_ranks, is_launched
from .pending import PendingMessage, RankLost

_MAX_ITEMS = 2**30  # items per message, because MPI counts them in 32 bits
_EXCHANGE_TAG = 1  # ``exchange`` needs its own tag: messages of ``post`` may be pending


class Solo:
    """The communicator of a single process. Every operation is the identity."""

    rank, size, local_rank, local_size, members, dead_ranks = 0, 1, 0, 1, (0,), ()
    is_tolerant = False
    bytes_sent = 0

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()

    def sum(self, buffer: np.ndarray) -> None:
        """Replace ``buffer`` by its sum over ranks, on every rank."""

    def broadcast(self, data: bytes) -> bytes:
        """Return the bytes of rank 0, on every rank."""
        return data

    def gather(self, send: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Return the numbers (float32) of all ranks, in rank order, on every rank.

        counts: how many numbers each rank contributes.
        """
        return send

    def exchange(
        self, send: np.ndarray, counts: Sequence[int], receive_counts: Sequence[int]
    ) -> np.ndarray:
        """Return the numbers (float32) that the other ranks sent to this one, in rank order.

        send: the numbers for rank 0, then those for rank 1, ..., ``counts`` of each;
        receive_counts: how many numbers each rank sends to this one.
        """
        return send

    def abort(self) -> None:
        """End the process."""
        sys.stderr.flush()
        os._exit(1)


class Mpi:
    """The ranks of a communicator, at first MPI_COMM_WORLD.

    Waiting polls and sleeps for a quarter of the time waited so far, at most 5 ms. A blocking wait
    would occupy a whole core, and a server waits most of the time. ``bytes_sent`` counts the bytes
    that this rank gave to MPI. ``members``: the number of each rank in MPI_COMM_WORLD;
    ``dead_ranks``: the numbers of dead ranks; ``is_tolerant``: whether the launcher lets ranks
    continue when one dies.

    Every operation raises RankLost when a rank is dead. The first rank to notice revokes the
    communicator, so that no rank waits for ever. Then all surviving ranks meet in ``agree`` exactly
    once, and only then continue without the dead one.
    """

    def __init__(self, world=None, heartbeat: Heartbeat | None = None) -> None:
        self._mpi = MPI = _mpi4py()
        self._world = MPI.COMM_WORLD if world is None else world
        self.heartbeat = heartbeat or Heartbeat()
        self.rank, self.size = self._world.rank, self._world.size
        self.members = tuple(
            self._world.group.Translate_ranks(range(self.size), MPI.COMM_WORLD.group)
        )
        self.heartbeat.members = self.members
        self.dead_ranks = tuple(
            rank for rank in range(MPI.COMM_WORLD.size) if rank not in self.members
        )
        self.is_tolerant = _launched_tolerant()
        self.local_rank, self.local_size = self.rank, self.size
        # if a rank has died, the first message raises RankLost
        with suppress(MPI.Exception) if self.is_tolerant else nullcontext():
            node = self._world.Split_type(MPI.COMM_TYPE_SHARED)
            self.local_rank, self.local_size = node.rank, node.size
            node.Free()
        self.bytes_sent = 0
        # incomplete messages: MPI may write to their buffers even after a failure
        self._unfinished: dict = {}

    def sum(self, buffer: np.ndarray) -> None:
        """Replace ``buffer`` by its sum over ranks, on every rank.

        For integers, the result does not depend on the order of summation.
        """
        self.bytes_sent += buffer.nbytes
        for part in _chunks(buffer):
            self._run_collective(
                lambda part=part: self._world.Iallreduce(self._mpi.IN_PLACE, part), buffer
            )

    def broadcast(self, data: bytes) -> bytes:
        """Return the bytes of rank 0, on every rank."""
        size = np.array([len(data)], np.int64)
        self._run_collective(lambda: self._world.Ibcast(size, root=0), size)
        buffer = np.frombuffer(bytearray(data if self.rank == 0 else size[0]), np.uint8)
        for part in _chunks(buffer):
            self._run_collective(lambda part=part: self._world.Ibcast(part, root=0), buffer)
        return buffer.tobytes()

    def gather(self, send: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Return the numbers (float32) of all ranks, in rank order, on every rank. See ``Solo``."""
        if sum(counts) > _MAX_ITEMS:
            result, ends = np.empty(sum(counts), np.float32), np.cumsum([0, *counts])
            for rank, (start, end) in enumerate(itertools.pairwise(ends)):
                result[start:end] = send if rank == self.rank else 0
            self.sum(result.view(np.int32))
            return result
        receive = np.empty(sum(counts), np.float32)
        self.bytes_sent += send.nbytes
        self._run_collective(
            lambda: self._world.Iallgatherv(send, [receive, counts]), send, receive
        )
        return receive

    def exchange(
        self, send: np.ndarray, counts: Sequence[int], receive_counts: Sequence[int]
    ) -> np.ndarray:
        """Return the numbers (float32) that the other ranks sent to this one. See ``Solo``.

        It uses point-to-point messages: each pair of ranks knows its own counts only, and no
        collective message can exceed what MPI can count.
        """
        receive = np.empty(sum(receive_counts), np.float32)
        self.bytes_sent += send.nbytes
        receive_parts, send_parts = (
            np.split(array, np.cumsum(lengths)[:-1])
            for array, lengths in ((receive, receive_counts), (send, counts))
        )
        message, world = PendingMessage(self, receive, send), self._world
        receives = [
            partial(world.Irecv, part, rank, _EXCHANGE_TAG)
            for rank, segment in enumerate(receive_parts)
            for part in _chunks(segment)
        ]
        sends = [
            partial(world.Isend, part, rank, _EXCHANGE_TAG)
            for rank, some in enumerate(send_parts)
            for part in _chunks(some)
        ]
        self._start(message, *receives, *sends)
        message.wait()
        return receive

    def post(
        self, send: np.ndarray, destination: int, receive: np.ndarray, source: int
    ) -> PendingMessage:
        """Begin to receive from one rank and to send to another.

        The arrays belong to MPI until the returned message is complete.
        """
        message, world = PendingMessage(self, receive, send), self._world
        receives = [partial(world.Irecv, part, source) for part in _chunks(receive)]
        self._start(
            message, *receives, *(partial(world.Isend, part, destination) for part in _chunks(send))
        )
        message.receive_count = len(receives)
        return message

    def agree(self) -> None:
        """Wait for all ranks. Raises RankLost on all if any is dead or has noticed a dead one."""
        if not self._all_agree(True):
            raise RankLost(self, has_agreed=True)

    def shrink(self, has_agreed: bool) -> "Mpi":
        """Return the communicator of the surviving ranks.

        has_agreed: whether this rank has already met them in ``agree``.
        """
        if not has_agreed:
            self._all_agree(False)
        comm, survivors = None, self._world.Shrink()
        while comm is None:
            try:
                comm = Mpi(survivors, self.heartbeat)
            except self._mpi.Exception:  # another rank has died
                survivors.Revoke()
                _wait_for(survivors.Iagree(np.zeros(1, np.int32)), self._mpi.Exception)
                survivors = survivors.Shrink()
        comm._unfinished[None] = self._unfinished
        return comm

    def abort(self) -> None:
        """End all ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(1)

    def is_complete(self, message: PendingMessage) -> bool:
        """Return whether the message is complete. Raises RankLost."""
        with self._raise_rank_lost():
            if self.is_tolerant and self._world.Is_revoked():
                raise RankLost(self)
            # a failed request must not be tested again: it would report success
            requests, message.requests = message.requests, []
            for number, request in enumerate(requests):
                message.completed[number] = message.completed[number] or request.Test()
            message.requests = requests
        if all(message.completed):
            self._unfinished.pop(id(message), None)
        return all(message.completed)

    def is_received(self, message: PendingMessage) -> bool:
        """Return whether the receive buffers are complete, even if the communicator was revoked."""
        requests, message.requests = message.requests, []  # as in ``is_complete``
        for number, request in enumerate(requests[: message.receive_count]):
            with suppress(self._mpi.Exception):
                message.completed[number] = message.completed[number] or request.Test()
        return message.completed[: message.receive_count] == [True] * message.receive_count

    def _run_collective(self, begin: Callable, *buffers: np.ndarray) -> None:
        """Begin a collective message and wait for it."""
        message = PendingMessage(self, *buffers)
        self._start(message, begin)
        message.wait()

    def _start(self, message: PendingMessage, *starters: Callable) -> None:
        self._unfinished[id(message)] = message
        with self._raise_rank_lost():
            for starter in starters:
                message.requests.append(starter())
                message.completed.append(False)

    def _all_agree(self, is_well: bool) -> bool:
        """Return whether all ranks are alive and ``is_well``. All ranks get the same answer."""
        flag = np.array([is_well], np.int32)
        with self.heartbeat.waiting():
            is_finished = _wait_for(self._world.Iagree(flag), self._mpi.Exception)
        return is_finished and bool(flag[0])

    @contextmanager
    def _raise_rank_lost(self) -> Iterator[None]:
        """Turn MPI's error for a dead rank into RankLost, on this rank and on all others."""
        try:
            yield
        except self._mpi.Exception as error:
            failure_codes = (
                self._mpi.ERR_PROC_FAILED,
                self._mpi.ERR_PROC_FAILED_PENDING,
                self._mpi.ERR_REVOKED,
            )
            if error.Get_error_class() not in failure_codes and not self._confirm_failure():
                raise
            self._world.Revoke()
            raise RankLost(self) from None

    def _confirm_failure(self) -> bool:
        """Return whether a rank proves dead within 5 s, after MPI has reported only ERR_OTHER."""
        deadline = time.monotonic() + 5
        while self.is_tolerant and time.monotonic() < deadline:
            if self._world.Is_revoked() or self._world.Get_failed().size:
                return True
            time.sleep(0.01)
        return False


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    """Return consecutive views of an array, each with at most as many items as MPI can count."""
    assert array.flags.c_contiguous
    flat = array.reshape(-1)
    return [flat[at : at + _MAX_ITEMS] for at in range(0, len(flat), _MAX_ITEMS)]


def _wait_for(request, failure: type[Exception]) -> bool:
    """Wait for a request. Returns False when it raises ``failure``."""
    try:
        while not request.Test():
            time.sleep(5e-4)
    except failure:
        return False
    return True


Comm = Solo | Mpi


def _launched_tolerant() -> bool:
    """Return whether the launcher lets ranks continue when one dies."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes")  # noqa: SIM112


def _mpi4py():
    """Return ``mpi4py.MPI``. Its first import in a process starts MPI."""
    # without this setting MPI_Finalize begins with a barrier, in which one process in four
    # waits for a dead rank for ever
    if _launched_tolerant():
        os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")
    from mpi4py import MPI

    return MPI


def connect() -> Comm:
    """Return the communicator of this process.

    Raises ValueError when a launcher started it but mpi4py or its MPI library is missing. Also
    raises ValueError when the process does not find the others: each would run the whole
    experiment.
    """
    try:
        comm = Mpi() if is_launched() else Solo()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"an MPI launcher started this process, but mpi4py does not work: {error}. Install it "
            "(pip install 'fedlora-mpi[mpi]', or mpi4py with your cluster's MPI) or start without "
            "the launcher"
        ) from error
    ranks, name = expected_ranks()
    if comm.size == 1 and ranks > 1:
        raise ValueError(
            f"{name} = {ranks}, but this process finds none of the others: start it as 'mpirun -n "
            f"{ranks} fedlora-mpi ...' or 'srun --mpi=pmix ...' with the MPI of mpi4py; for one "
            f"process alone first 'unset {name}'"
        )
    return comm


def library_version() -> str:
    """Return name and version of the MPI library that mpi4py uses."""
    return (
        _mpi4py()
        .Get_library_version()
        .rstrip("\0")
        .partition("\n")[0]
        .partition(", package")[0]
        .strip()
    )


def supports_ulfm() -> bool:
    """Kill the last rank and return whether the others can continue without it (ULFM)."""
    MPI = _mpi4py()
    world = MPI.COMM_WORLD
    world.Set_errhandler(MPI.ERRORS_RETURN)
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.Barrier()
    except MPI.Exception:
        world.Revoke()
        return world.Shrink().size == world.size - 1
    return False
