"""Pending messages between ranks, and the error raised when a rank dies.

``comm.Mpi`` sends the messages.
"""

import time

import numpy as np


class RankLost(Exception):
    """A rank has died, so a message will never be complete. Every waiting rank raises it.

    comm: the ``Mpi`` that includes the dead rank; has_agreed: whether the other ranks know of the
    failure, as they do after ``Mpi.agree``.
    """

    def __init__(self, comm, has_agreed: bool = False) -> None:
        super().__init__("another rank has died")
        self.comm, self.has_agreed = comm, has_agreed

    def shrink(self):
        """Return the ``Mpi`` of the surviving ranks, in their order. Each of them must call it."""
        return self.comm.shrink(self.has_agreed)


class PendingMessage:
    """Pending messages of ``comm``; the first ``receive_count`` of them are sent to this rank.

    ``buffers`` belong to MPI until all messages are complete.
    """

    def __init__(self, comm, *buffers: np.ndarray) -> None:
        self.comm, self.buffers = comm, buffers
        self.requests: list = []
        self.receive_count = 1
        self.completed: list[bool] = []

    def is_complete(self) -> bool:
        """Return whether all messages are complete. Raises RankLost.

        It does not wait, but lets MPI make progress.
        """
        return self.comm.is_complete(self)

    def wait(self) -> None:
        """Wait until all messages are complete. Raises RankLost.

        It sleeps meanwhile, to leave the core to others.
        """
        with self.comm.heartbeat.waiting():
            started = time.perf_counter()
            while not self.is_complete():
                time.sleep(min(max((time.perf_counter() - started) / 4, 2e-5), 5e-3))

    def is_received(self) -> bool:
        """Return whether the messages to this rank are complete, even if a rank has died since."""
        return self.comm.is_received(self)
