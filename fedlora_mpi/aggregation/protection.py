"""What happens to uploads on their way into the sum. Here nothing; ``privacy`` has the rest."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from torch import Tensor

from .exact_sum import ExactSum, FastSum

Message = ExactSum | FastSum
MessageOfClient = Callable[[int], AbstractContextManager[Message]]


class Protection:
    """Uploads enter the sum as they are."""

    is_differential = False  # whether the sum is one of clipped updates with noise
    sums_modulo = False  # whether the integers of a message wrap around

    def messages(self, message: Message, members: frozenset[int], round_: int) -> MessageOfClient:
        """client -> the message into which that client writes; it ends in ``message``."""
        return lambda client: nullcontext(message)

    def contribution(
        self, reference: Tensor, members: frozenset[int], round_: int, vector: Tensor, client: int
    ) -> Tensor:
        """What a client adds to the sum, [D]. ``reference``: the vector of an untrained client."""
        return vector

    def noise(self, size: int, members: frozenset[int], round_: int) -> Tensor:
        """What the server adds to the sum, [D]."""
        raise AssertionError("only a differentially private sum has noise")

    def as_summed(self, buffer: np.ndarray) -> np.ndarray:
        """A view of a message as MPI must add it up."""
        return buffer.view(np.uint64) if self.sums_modulo else buffer
