"""Sums of client vectors that do not depend on the order or the grouping of the clients.

Floating-point addition depends on the order. So a mean over 3 ranks would differ from a mean over 2
ranks in the last bits, and after 300 rounds of SGD the difference is visible. ``ExactSum`` adds
integers instead.
"""

import numpy as np
import torch
from torch import Tensor

from ..core.transfer import to_device, to_host

_HIGH_SCALE = 2.0**24  # the first limb counts units of 2^-24 ...
_LOW_SCALE = 2.0**66  # ... the second holds the remainder in units of 2^-66
# a chunk of numbers stays in a core's cache: 6 times as fast as separate passes over all numbers
_CHUNK_SIZE = 2**16
CPU = torch.device("cpu")
LIMIT = 2.0**38  # bound of a sum's magnitude: half of the range of 63 bits in units of 2^-24


class ExactSum:
    """A fixed-point sum: every order of its terms gives the same bits.

    Each weighted number becomes two int64. The product with the weight is exact in float64 for
    integer weights below 2^29. Digits below 2^-66 are rounded off, once per client. Callers keep
    |sum of weight * value| below ``LIMIT``. Numbers on a GPU are added there; they are copied to
    the host when ``buffer`` is read.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self._host_limbs = torch.zeros(2, size, dtype=torch.int64)
        self._gpu_limbs: Tensor | None = None  # the rest of the sum, on a GPU

    @property
    def buffer(self) -> np.ndarray:
        """The writable array [2, size] on the host that one allreduce has to sum."""
        if self._gpu_limbs is not None:
            self._host_limbs = self._host_limbs + to_host([self._gpu_limbs])[0]
            self._gpu_limbs = None
        return self._host_limbs.numpy()

    @buffer.setter
    def buffer(self, values: np.ndarray) -> None:
        self._host_limbs, self._gpu_limbs = torch.from_numpy(values), None

    def add(self, vector: Tensor, weight: float, offset: int = 0) -> None:
        """Add weight * vector [n] to the numbers from position ``offset`` on.

        The host does not wait for a GPU.
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
        """The sum of the numbers from position ``offset`` on, float64 [size - offset].

        It is computed on ``device``.
        """
        high, low = to_device(torch.from_numpy(self.buffer[:, offset:]), device).double()
        return high / _HIGH_SCALE + low / _LOW_SCALE


class FastSum:
    """A sum in float32 [size], or in float64 if ``dtype`` is.

    It has a quarter of the exact sum's bytes, but its last bits depend on the number of ranks.
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
    """``mean`` of a leaf, with ``previous`` where a float64 differs from it by rounding alone.

    So the mean of numbers that no client has changed is exactly these numbers.
    """
    if mean.dtype != torch.float64 or previous is None or previous.shape != mean.shape:
        return mean
    return torch.where((mean - previous).abs() <= 2**-50 * previous.abs(), previous, mean)


SUM_TYPES: dict[str, type[ExactSum] | type[FastSum]] = {"exact": ExactSum, "fast": FastSum}
