"""The only file that knows there are ranks: few verbs, each one message of one flat buffer.

``connect()`` gives the communicator of this process: ``Mpi`` under a launcher, ``Solo`` without
one, which needs no MPI library.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")
_TEXT = 2000  # bytes of an error message that travel


class Solo:
    """One process: every verb is the identity."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    moved = 0

    def sum(self, buffer: np.ndarray) -> None:
        """Replace ``buffer`` by its sum over ranks, on every rank."""

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        return data

    def gather(self, send: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """What all ranks sent, float32, in rank order, on every rank; ``counts``: numbers of each rank."""
        return send

    def exchange(self, send: np.ndarray, counts: Sequence[int], arriving: Sequence[int]) -> np.ndarray:
        """What the other ranks sent to this one, float32, in rank order.

        send: the numbers for rank 0, then those for rank 1, ...: ``counts`` of them; arriving: how
        many come from each rank.
        """
        return send

    def abort(self) -> None:
        """End the process."""
        sys.stderr.flush()
        os._exit(1)


class Mpi:
    """The ranks of MPI_COMM_WORLD.

    Waits poll with sleeps that double up to 2 ms: a blocking wait would spin a whole core, and a
    server waits most of the time. ``moved`` counts the bytes this rank handed to MPI.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size
        node = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        node.Free()
        self.moved = 0

    def sum(self, buffer: np.ndarray) -> None:
        """Replace ``buffer`` by its sum over ranks, on every rank. Order-free for integers."""
        self.moved += buffer.nbytes
        self._wait(self._world.Iallreduce(self._mpi.IN_PLACE, buffer))

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        size = np.array([len(data)], np.int64)
        self._wait(self._world.Ibcast(size, root=0))
        buffer = np.frombuffer(bytearray(data if self.rank == 0 else size[0]), np.uint8)
        self._wait(self._world.Ibcast(buffer, root=0))
        return buffer.tobytes()

    def gather(self, send: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """What all ranks sent, float32, in rank order, on every rank; ``counts``: numbers of each rank."""
        receive = np.empty(sum(counts), np.float32)
        self.moved += send.nbytes
        self._wait(self._world.Iallgatherv(send, [receive, counts]))
        return receive

    def exchange(self, send: np.ndarray, counts: Sequence[int], arriving: Sequence[int]) -> np.ndarray:
        """What the other ranks sent to this one, float32, in rank order (see ``Solo``)."""
        receive = np.empty(sum(arriving), np.float32)
        self.moved += send.nbytes
        self._wait(self._world.Ialltoallv([send, counts], [receive, arriving]))
        return receive

    def abort(self) -> None:
        """End all ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(1)

    def _wait(self, request) -> None:
        pause = 2e-5
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)


Comm = Solo | Mpi


def connect() -> Comm:
    """The communicator of this process.

    Raises ValueError when a launcher started it but mpi4py or its MPI library is missing.
    """
    if not any(name in os.environ for name in _LAUNCHED):
        return Solo()
    try:
        return Mpi()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"an MPI launcher started this process, but mpi4py does not work: {error}. Install it "
            "(pip install 'fedlora-mpi[mpi]', or mpi4py with your cluster's MPI) or start without the launcher"
        ) from error


def library() -> str:
    """Name and version of the MPI library that mpi4py has found."""
    from mpi4py import MPI

    return MPI.Get_library_version().rstrip("\0").partition("\n")[0].partition(", package")[0].strip()


def outlives() -> bool:
    """Whether the other ranks can go on without the last one, which dies (ULFM)."""
    from mpi4py import MPI

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


class Everywhere(Exception):
    """An end that every rank reaches at the same point, so each can leave by itself."""

    code = 1


class Refused(Everywhere):
    """The user's mistake."""

    code = 2


class Fault(Everywhere):
    """Something that no configuration check could see, for instance a loss that is not finite."""


def together(comm: Comm, stage: Callable[[], T]) -> T:
    """Run ``stage`` on every rank and go on only if it succeeds on all.

    A user's mistake (ValueError) on any rank raises Refused on all, with the text of the lowest
    such rank: no rank waits for one that has left.
    """
    result, text = None, b""
    try:
        result = stage()
    except ValueError as error:
        text = str(error).encode()[:_TEXT]
    table = np.zeros((comm.size, _TEXT + 1), np.uint8)
    table[comm.rank, : len(text)] = np.frombuffer(text, np.uint8)
    table[comm.rank, _TEXT] = bool(text)
    comm.sum(table)  # each row is set by one rank
    failed = np.flatnonzero(table[:, _TEXT])
    if failed.size:
        raise Refused(table[failed[0], :_TEXT].tobytes().rstrip(b"\0").decode(errors="replace"))
    return result


def guarded(comm: Comm, main: Callable[[], int]) -> int:
    """The exit code of ``main``. An exception that only this rank met ends ALL ranks, with its
    traceback: the others would otherwise wait for this one for ever."""
    try:
        return main()
    except Everywhere as end:
        if comm.rank == 0:
            print(f"fedlora-mpi: {end}", file=sys.stderr, flush=True)
        return end.code
    except KeyboardInterrupt:
        return 130  # as a shell reports it; what the last checkpoint holds is safe
    except Exception:
        print(f"[rank {comm.rank} of {comm.size}] stopped all ranks:", file=sys.stderr)
        traceback.print_exc()
        comm.abort()
    return 1
