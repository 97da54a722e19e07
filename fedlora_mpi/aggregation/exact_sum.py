"""Sums of client vectors that do not depend on the order or the grouping of the clients.

Floating-point addition depends on order, so a mean over 3 ranks would differ from one over 2 in
the last bits, and 300 rounds of SGD make that visible. ``ExactSum`` adds integers instead.
"""

import numpy as np
import torch
from torch import Tensor

from ..core.transfer import to_device, to_host

_HIGH_SCALE = 2.0**24  # the first limb counts units of 2^-24 ...
_LOW_SCALE = 2.0**66  # ... the second what is left, in units of 2^-66
# numbers that stay in a core's cache: 6 times as fast as one pass after the other over all of them
_CHUNK_SIZE = 2**16
CPU = torch.device("cpu")
LIMIT = 2.0**38  # bound of a sum's magnitude: half of what 63 bits of 2^-24 hold


class ExactSum:
    """Fixed point: each weighted number becomes two int64, so every order gives the same bits.

    The product with the weight is exact in float64 for integer weights below 2^29; digits under
    2^-66 are rounded off, once per client. Callers keep |sum of weight * value| below ``LIMIT``.
    What is on a GPU is added up there, and comes to the host when somebody asks for ``buffer``.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self._host_limbs = torch.zeros(2, size, dtype=torch.int64)
        self._gpu_limbs: Tensor | None = None  # the rest of the sum, on a GPU

    @property
    def buffer(self) -> np.ndarray:
        """[2, size] on the host, to be written to: what one allreduce has to add up."""
        if self._gpu_limbs is not None:
            self._host_limbs = self._host_limbs + to_host([self._gpu_limbs])[0]
            self._gpu_limbs = None
        return self._host_limbs.numpy()

    @buffer.setter
    def buffer(self, values: np.ndarray) -> None:
        self._host_limbs, self._gpu_limbs = torch.from_numpy(values), None

    def add(self, vector: Tensor, weight: float, offset: int = 0) -> None:
        """Add weight * vector [n] to the numbers from position ``offset`` on; the host waits for no
        GPU.
        """
        limbs, chunk_size = self._host_limbs, _CHUNK_SIZE
        if vector.device.type != "cpu":
            if self._gpu_limbs is None:
                self._gpu_limbs = torch.zeros(
                    self._host_limbs.shape, dtype=torch.int64, device=vector.device
                )
            limbs, chunk_size = self._gpu_limbs, max(1, len(vector))
        limb_chunks = (limb.split(chunk_size) for limb in limbs[:, offset : offset + len(vector)])
        for numbers, high, low in zip(vector.split(chunk_size), *limb_chunks, strict=True):
            value = numbers.to(torch.float64, copy=True).mul_(weight * _HIGH_SCALE)
            units = value.round()
            high.add_(units.long())
            low.add_(value.sub_(units).mul_(_LOW_SCALE / _HIGH_SCALE).round_().long())

    def total(self, offset: int = 0, device: torch.device = CPU) -> Tensor:
        """The sum of the numbers from position ``offset`` on, float64 [size - offset], computed on
        ``device``.
        """
        high, low = to_device(torch.from_numpy(self.buffer[:, offset:]), device).double()
        return high / _HIGH_SCALE + low / _LOW_SCALE


class FastSum:
    """float32 [size]: a quarter of the exact sum's bytes, another last bit on other ranks. Of
    numbers of float64 it is float64.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.buffer = torch.zeros(size, dtype=dtype).numpy()

    def add(self, vector: Tensor, weight: float, offset: int = 0) -> None:
        """Add weight * vector [n] to the numbers from position ``offset`` on."""
        torch.from_numpy(self.buffer)[offset : offset + len(vector)].add_(
            vector.cpu(), alpha=weight
        )

    def total(self, offset: int = 0, device: torch.device = CPU) -> Tensor:
        """The sum of the numbers from ``offset`` on, float64 [size - offset], on ``device``."""
        return to_device(torch.from_numpy(self.buffer[offset:]), device).double()


def absorb_rounding(mean: Tensor, previous: Tensor | None) -> Tensor:
    """``mean`` of a leaf, where a float64 that differs from ``previous`` by rounding alone is
    ``previous``: the mean of numbers that nobody moved is then these numbers.
    """
    if mean.dtype != torch.float64 or previous is None or previous.shape != mean.shape:
        return mean
    return torch.where((mean - previous).abs() <= 2**-50 * previous.abs(), previous, mean)


SUM_TYPES: dict[str, type[ExactSum] | type[FastSum]] = {"exact": ExactSum, "fast": FastSum}
