"""Messages on their way between ranks, and what ends them when a rank dies; ``comm.Mpi`` sends
them.
"""

import time

import numpy as np


class RankLost(Exception):
    """A rank has died, so a message will never be complete: the same end for all that still wait
    for one.

    comm: the ``Mpi`` with the dead in it; agreed: whether the other ranks know, as they do after
    ``Mpi.agree``.
    """

    def __init__(self, comm, has_agreed: bool = False) -> None:
        super().__init__("another rank has died")
        self.comm, self.has_agreed = comm, has_agreed

    def shrink(self):
        """The ``Mpi`` of the ranks that are left, in their order; each of them calls it."""
        return self.comm.shrink(self.has_agreed)


class PendingMessage:
    """Messages of ``comm`` on their way, the ``first`` of them to this rank; ``buffers`` are MPI's
    until all is through.
    """

    def __init__(self, comm, *buffers: np.ndarray) -> None:
        self.comm, self.buffers = comm, buffers
        self.requests: list = []
        self.receive_count = 1
        self.completed: list[bool] = []

    def is_complete(self) -> bool:
        """Whether all is done; looks without waiting, which also moves it on. Raises Lost."""
        return self.comm.is_complete(self)

    def wait(self) -> None:
        """Wait until all is done, in steps that leave the core to others. Raises Lost."""
        with self.comm.heartbeat.waiting():
            started = time.perf_counter()
            while not self.is_complete():
                time.sleep(min(max((time.perf_counter() - started) / 4, 2e-5), 5e-3))

    def is_received(self) -> bool:
        """Whether what comes to this rank is here, whole, even if a rank has died since."""
        return self.comm.is_received(self)
