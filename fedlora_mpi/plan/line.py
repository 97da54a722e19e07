"""The cost of a stack of clients as a linear function: a constant, plus a cost per batch, per batch
of each client, and per sample.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class CostLine(NamedTuple):
    """The cost of clients that are computed together, in any unit. It covers all epochs of
    a round.
    """

    per_round: float  # once a round
    per_batch: float  # of each batch, independent of its size
    per_sample: float  # of each sample of each client
    per_client_batch: float = 0.0  # of each batch of each client, without its samples

    def cost(self, sizes: Sequence[int], batch_size: int) -> float:
        """The cost of one stack whose clients have ``sizes`` samples."""
        batches = [-(-size // batch_size) for size in sizes]
        return (
            self.per_round
            + self.per_batch * max(batches, default=0)
            + self.per_client_batch * sum(batches)
            + self.per_sample * sum(sizes)
        )

    @classmethod
    def through(
        cls, measure: Callable[[int], float], clients: int, samples: int, batch_size: int
    ) -> "CostLine":
        """Fit the line to ``measure(limit)``: the cost of ``clients`` clients with ``samples``
        samples each, of which each uses ``limit``.

        No coefficient is negative. If noise would make the cost of a batch negative, the whole
        difference between two sizes is attributed to their samples.
        """
        half_batch, full_batch, many = sample_limits(samples, batch_size)
        half_cost, full_cost, many_cost = measure(half_batch), measure(full_batch), measure(many)
        sample = max(0.0, full_cost - half_cost) / max(1, clients * (full_batch - half_batch))
        if many == full_batch:
            return cls(max(0.0, full_cost - sample * clients * full_batch), 0.0, sample)
        extra_cost, batches = max(0.0, many_cost - full_cost), -(-many // batch_size) - 1
        sample = min(sample, extra_cost / (clients * (many - full_batch)))
        batch = (extra_cost - sample * clients * (many - full_batch)) / batches
        return cls(max(0.0, full_cost - batch - sample * clients * full_batch), batch, sample)

    def with_client_cost(
        self,
        measure: Callable[[int], float],
        fewer: int,
        clients: int,
        samples: int,
        batch_size: int,
    ) -> "CostLine":
        """Return the line with the batch cost split into a common part and a part per client.

        The line was fitted to ``clients`` clients; ``measure(limit)`` is the cost of ``fewer``
        clients.
        """
        _, full_batch, many = sample_limits(samples, batch_size)
        if many == full_batch:
            return self
        batches = -(-many // batch_size) - 1
        fewer_batch_cost = (
            measure(many) - measure(full_batch) - self.per_sample * fewer * (many - full_batch)
        ) / batches
        client = min(
            max(0.0, (self.per_batch - fewer_batch_cost) / (clients - fewer)),
            self.per_batch / clients,
        )
        return self._replace(per_batch=self.per_batch - client * clients, per_client_batch=client)


def sample_limits(samples: int, batch_size: int) -> tuple[int, int, int]:
    """(half a batch, a batch, three batches), each at most ``samples``."""
    full = min(samples, batch_size)
    return max(1, full // 2), full, min(samples, 3 * batch_size)
