"""Sums of client vectors that do not depend on the order or the grouping of the clients.

Floating-point addition depends on order, so a mean over 3 ranks would differ from one over 2 in
the last bits, and 300 rounds of SGD make that visible. ``ExactSum`` adds integers instead.
"""

import numpy as np
import torch
from torch import Tensor

from ..core.transfer import to_device, to_host

_HIGH = 2.0**24  # the first limb counts units of 2^-24 ...
_LOW = 2.0**66  # ... the second what is left, in units of 2^-66
# numbers that stay in a core's cache: 6 times as fast as one pass after the other over all of them
_PART = 2**16
CPU = torch.device("cpu")
LIMIT = 2.0**38  # bound of a sum's magnitude: half of what 63 bits of 2^-24 hold


class ExactSum:
    """Fixed point: each weighted number becomes two int64, so every order gives the same bits.

    The product with the weight is exact in float64 for integer weights below 2^29; digits under
    2^-66 are rounded off, once per client. Callers keep |sum of weight * value| below ``LIMIT``.
    What is on a GPU is added up there, and comes to the host when somebody asks for ``buffer``.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self._here = torch.zeros(2, size, dtype=torch.int64)
        self._there: Tensor | None = None  # the rest of the sum, on a GPU

    @property
    def buffer(self) -> np.ndarray:
        """[2, size] on the host, to be written to: what one allreduce has to add up."""
        if self._there is not None:
            self._here = self._here + to_host([self._there])[0]
            self._there = None
        return self._here.numpy()

    @buffer.setter
    def buffer(self, whole: np.ndarray) -> None:
        self._here, self._there = torch.from_numpy(whole), None

    def add(self, vector: Tensor, weight: float, at: int = 0) -> None:
        """Add weight * vector [n] to the numbers from position ``at`` on; the host waits for no
        GPU.
        """
        limbs, part = self._here, _PART
        if vector.device.type != "cpu":
            if self._there is None:
                self._there = torch.zeros(self._here.shape, dtype=torch.int64, device=vector.device)
            limbs, part = self._there, max(1, len(vector))
        places = (limb.split(part) for limb in limbs[:, at : at + len(vector)])
        for numbers, high, low in zip(vector.split(part), *places, strict=True):
            value = numbers.to(torch.float64, copy=True).mul_(weight * _HIGH)
            units = value.round()
            high.add_(units.long())
            low.add_(value.sub_(units).mul_(_LOW / _HIGH).round_().long())

    def total(self, at: int = 0, device: torch.device = CPU) -> Tensor:
        """The sum of the numbers from position ``at`` on, float64 [size - at], computed on
        ``device``.
        """
        high, low = to_device(torch.from_numpy(self.buffer[:, at:]), device).double()
        return high / _HIGH + low / _LOW


class FastSum:
    """float32 [size]: a quarter of the exact sum's bytes, another last bit on other ranks. Of
    numbers of float64 it is float64.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.buffer = torch.zeros(size, dtype=dtype).numpy()

    def add(self, vector: Tensor, weight: float, at: int = 0) -> None:
        """Add weight * vector [n] to the numbers from position ``at`` on."""
        torch.from_numpy(self.buffer)[at : at + len(vector)].add_(vector.cpu(), alpha=weight)

    def total(self, at: int = 0, device: torch.device = CPU) -> Tensor:
        """The sum of the numbers from position ``at`` on, float64 [size - at], on ``device``."""
        return to_device(torch.from_numpy(self.buffer[at:]), device).double()


def settle(mean: Tensor, before: Tensor | None) -> Tensor:
    """``mean`` of a leaf; of float64 what was there ``before`` where they differ by rounding alone,
    so that the mean of numbers that nobody has moved is these numbers, as it is of coarser ones.
    """
    if mean.dtype != torch.float64 or before is None or before.shape != mean.shape:
        return mean
    return torch.where((mean - before).abs() <= 2**-50 * before.abs(), before, mean)


SUMS = {"exact": ExactSum, "fast": FastSum}
