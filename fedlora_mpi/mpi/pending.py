"""Messages on their way between ranks, and the error that ends them when a rank dies.

``comm.Mpi`` sends them.
"""

import time

import numpy as np


class RankLost(Exception):
    """A rank has died, so a message will never be complete; raised on every rank that waits.

    comm: the ``Mpi`` that includes the dead rank; has_agreed: whether the other ranks know, as they
    do after ``Mpi.agree``.
    """

    def __init__(self, comm, has_agreed: bool = False) -> None:
        super().__init__("another rank has died")
        self.comm, self.has_agreed = comm, has_agreed

    def shrink(self):
        """The ``Mpi`` of the surviving ranks, in their order; each of them calls it."""
        return self.comm.shrink(self.has_agreed)


class PendingMessage:
    """Messages of ``comm`` on their way; the first ``receive_count`` of them are to this rank.

    ``buffers`` belong to MPI until all messages are complete.
    """

    def __init__(self, comm, *buffers: np.ndarray) -> None:
        self.comm, self.buffers = comm, buffers
        self.requests: list = []
        self.receive_count = 1
        self.completed: list[bool] = []

    def is_complete(self) -> bool:
        """Whether all are complete; does not wait, but lets MPI progress. Raises RankLost."""
        return self.comm.is_complete(self)

    def wait(self) -> None:
        """Wait until all are complete; sleeps, to leave the core to others. Raises RankLost."""
        with self.comm.heartbeat.waiting():
            started = time.perf_counter()
            while not self.is_complete():
                time.sleep(min(max((time.perf_counter() - started) / 4, 2e-5), 5e-3))

    def is_received(self) -> bool:
        """Whether the messages to this rank are complete, even if a rank has died since."""
        return self.comm.is_received(self)
