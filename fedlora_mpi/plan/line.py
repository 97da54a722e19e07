"""What a stack of clients costs as a straight line: so much each time, for each batch, for each
client that still has samples in it, and for each of these.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """A cost of clients that compute together, in any unit; the epochs of a round are in it."""

    once: float  # of a round
    batch: float  # of each batch, whatever its size
    sample: float  # of each sample of each client
    client: float = 0.0  # of each batch of each client, beside its samples

    def of(self, sizes: Sequence[int], batch_size: int) -> float:
        """The cost of clients with so many samples each in one stack."""
        batches = [-(-size // batch_size) for size in sizes]
        return (
            self.once
            + self.batch * max(batches, default=0)
            + self.client * sum(batches)
            + self.sample * sum(sizes)
        )

    @classmethod
    def through(
        cls, measured: Callable[[int], float], clients: int, samples: int, batch_size: int
    ) -> "Line":
        """The line through ``measured(limit)``, the cost of ``clients`` of so many samples when
        each uses ``limit``.

        Nothing comes out negative: where noise would have it so, what two sizes differ by is all
        their samples'.
        """
        few, full, many = limits(samples, batch_size)
        small, one, several = measured(few), measured(full), measured(many)
        sample = max(0.0, one - small) / max(1, clients * (full - few))
        if many == full:
            return cls(max(0.0, one - sample * clients * full), 0.0, sample)
        more, batches = max(0.0, several - one), -(-many // batch_size) - 1
        sample = min(sample, more / (clients * (many - full)))
        batch = (more - sample * clients * (many - full)) / batches
        return cls(max(0.0, one - batch - sample * clients * full), batch, sample)

    def shared(
        self,
        measured: Callable[[int], float],
        fewer: int,
        clients: int,
        samples: int,
        batch_size: int,
    ) -> "Line":
        """The line, found through the cost of ``clients``, with the part of a batch's cost that is
        each client's own, by ``measured(limit)``, the cost of ``fewer`` of them.
        """
        _, full, many = limits(samples, batch_size)
        if many == full:
            return self
        batches = -(-many // batch_size) - 1
        of_fewer = (measured(many) - measured(full) - self.sample * fewer * (many - full)) / batches
        client = min(max(0.0, (self.batch - of_fewer) / (clients - fewer)), self.batch / clients)
        return self._replace(batch=self.batch - client * clients, client=client)


def limits(samples: int, batch_size: int) -> tuple[int, int, int]:
    """Of so many samples: half a batch, a batch, and three or what there is."""
    full = min(samples, batch_size)
    return max(1, full // 2), full, min(samples, 3 * batch_size)
