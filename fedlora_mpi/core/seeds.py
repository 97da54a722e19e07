"""Randomness is addressed, not consumed: a draw never depends on earlier draws.

There are two kinds. ``rng`` gives a CPU generator for an address (shuffles, initial weights).
``uniform`` computes noise from integer keys as a pure tensor function (dropout). So it gives the
same numbers in a loop over clients, under ``vmap``, on a CPU and on a GPU.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Generator, Tensor


def derive_key(seed: int, *address: int | str) -> int:
    """A 62-bit number for an address such as ``("order", client, round, epoch)``."""
    digest = hashlib.blake2b(repr((seed, *address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def rng(seed: int, *address: int | str) -> Generator:
    """A fresh generator whose stream depends on the address alone."""
    return Generator().manual_seed(derive_key(seed, *address))


def uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float32 of ``shape``, a pure function of the int64 scalar ``key``.

    Counter mode: position i is mixed with the key by the finaliser of splitmix64 (Steele et al.,
    OOPSLA 2014); int64 products wrap, right shifts are masked to be logical.
    """
    counter = torch.arange(math.prod(shape), device=key.device)
    z = (counter + 1) * -7046029254386353131 + key  # golden gamma 0x9e3779b97f4a7c15
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94d049bb133111eb
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return (z & 0xFFFFFF).to(torch.float32).mul(2.0**-24).view(shape)


def normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gaussian numbers of mean 0 and variance 1, float32 of ``shape``, a pure function of ``key``.

    The first rows are the same however many rows there are.
    """
    u, v = uniform(key, (math.prod(shape), 2)).unbind(1)
    return ((-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)).view(shape)  # Box, Muller


@contextmanager
def isolate_rng(seed: int, *address: int | str) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and Python are seeded from the address.

    This is for foreign code: constructors of ``nn.Module``, for example, have no other source of
    randomness. The global states are restored afterwards, so the code outside is not affected.
    Generators that foreign code makes for itself are not covered.
    """
    derived_seed, python_state, numpy_state = (
        derive_key(seed, *address),
        random.getstate(),
        np.random.get_state(),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(derived_seed)
            random.seed(derived_seed)
            np.random.seed((derived_seed & 0xFFFFFFFF, derived_seed >> 32))
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def global_states() -> dict[str, object]:
    """The states of the global generators, for a comparison; nothing in this package moves them."""
    numpy_state = tuple(
        part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()
    )
    torch_state = torch.get_rng_state().numpy().tobytes()
    return {"torch's": torch_state, "numpy's": numpy_state, "Python's": random.getstate()}
