"""An exact sum over ranks in 8 bytes a number instead of 16, wherever the sum fits into them."""

from collections.abc import Callable

import numpy as np

_BLOCK = 256  # numbers that share a unit
_CHUNK_BLOCKS = 256  # blocks that are computed together: they stay in a core's cache
_LIMB_BITS = 42  # a unit of the first limb is 2^42 units of the second
# The units tried, 2^shift units of the second limb, but 0; four counts fit into one int64.
_SHIFTS = (10, 20, 30, _LIMB_BITS)
_COUNT_BITS = 16
MIN_SIZE = 2**15  # numbers; the exchange of fewer takes no time worth saving


def sum_limbs(
    limbs: np.ndarray,
    ranks: int,
    sum_facts: Callable[[np.ndarray], None],
    sum_numbers: Callable[[np.ndarray], None],
) -> int:
    """Sum the limbs [2, n] of an ``ExactSum`` over all ranks, in place; bytes given to MPI.

    The two callables sum an int64 array over all ranks; ``sum_facts`` is the first message. ranks:
    fewer than 2^15.

    Let h and l be the limbs of a number on one rank; it stands for v = 2^42 h + l. A first small
    message has of each block of 256 numbers the sums over ranks of max |h| and of max |l|, called H
    and L, and for some shifts s the number of ranks whose l are all divisible by 2^s. If all ranks'
    are, v / 2^s is an integer, and the sum of these over ranks is at most (2^42 H + L) / 2^s. Where
    that is below 2^62, int64 holds it, and the sums are exact. Other blocks travel as they are.

    ``ExactSum.total`` has the same bits as without this function: a block travels in 8 bytes only
    if H and L are below 2^52. float64 then holds both limbs exactly, and the total is the exact sum
    rounded once, however it is divided into limbs.
    """
    assert ranks < 2 ** (_COUNT_BITS - 1)
    blocks = limbs.shape[1] // _BLOCK
    whole = blocks * _BLOCK
    high, low = (limb[:whole].reshape(blocks, _BLOCK) for limb in limbs)
    facts = _describe_blocks(high, low)
    sum_facts(facts)
    shifts = _choose_shifts(facts, ranks)  # -1: the block does not fit
    fits = shifts >= 0
    compact = int(fits.sum()) * _BLOCK
    packed = np.empty(compact + 2 * (limbs.shape[1] - compact), np.int64)
    short, long = packed[:compact].reshape(-1, _BLOCK), packed[compact:].reshape(2, -1)
    short_ends, long_ends = (np.cumsum([0, *which]) for which in (fits, ~fits))
    chunks = [slice(at, min(at + _CHUNK_BLOCKS, blocks)) for at in range(0, blocks, _CHUNK_BLOCKS)]
    long_blocks = long[:, : blocks * _BLOCK - compact].reshape(2, -1, _BLOCK)
    for chunk in chunks:
        here = _selection(fits[chunk])
        into = short[short_ends[chunk.start] : short_ends[chunk.stop]]
        shift = shifts[chunk, None][here]
        np.left_shift(high[chunk][here], _LIMB_BITS - shift, out=into)
        into += low[chunk][here] >> shift
        for limb, rest in zip((high, low), long_blocks, strict=True):
            rest[long_ends[chunk.start] : long_ends[chunk.stop]] = limb[chunk][~fits[chunk]]
    long[:, blocks * _BLOCK - compact :] = limbs[:, whole:]
    sum_numbers(packed)
    for chunk in chunks:
        here = _selection(fits[chunk])
        total = short[short_ends[chunk.start] : short_ends[chunk.stop]]
        shift = shifts[chunk, None][here]
        high[chunk][here] = total >> (_LIMB_BITS - shift)
        total &= (1 << (_LIMB_BITS - shift)) - 1
        low[chunk][here] = total << shift
        for limb, rest in zip((high, low), long_blocks, strict=True):
            limb[chunk][~fits[chunk]] = rest[long_ends[chunk.start] : long_ends[chunk.stop]]
    limbs[:, whole:] = long[:, blocks * _BLOCK - compact :]
    return facts.nbytes + packed.nbytes


def _selection(which: np.ndarray) -> np.ndarray | slice:
    """``which``, as a slice where it is everything: such a selection is no copy."""
    return slice(None) if which.all() else which


def bytes_per_number() -> float:
    """Bytes that travel for a number if all blocks fit."""
    return 8 + 3 * 8 / _BLOCK


def _describe_blocks(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """max |h|, max |l| and the shifts that divide all l, int64 [3, blocks]."""
    facts = np.empty((3, len(high)), np.int64)
    for at in range(0, len(high), _CHUNK_BLOCKS):
        chunk = slice(at, at + _CHUNK_BLOCKS)
        for row, limb in enumerate((high[chunk], low[chunk])):
            facts[row, chunk] = np.maximum(limb.max(1), -limb.min(1))
        bits = np.bitwise_or.reduce(low[chunk], 1)
        facts[2, chunk] = sum(
            ((bits & ((1 << shift) - 1)) == 0).astype(np.int64) << (_COUNT_BITS * place)
            for place, shift in enumerate(_SHIFTS)
        )
    return facts


def _choose_shifts(facts: np.ndarray, ranks: int) -> np.ndarray:
    """The unit of each block, as its power of two; -1 if int64 does not hold the block's sums."""
    high, low, counts = facts
    shifts = np.zeros(len(high), np.int64)
    for place, shift in enumerate(_SHIFTS):
        divides = (counts >> (_COUNT_BITS * place)) % (1 << _COUNT_BITS) == ranks
        shifts[divides] = shift
    bound = high * 2.0**_LIMB_BITS + low
    fits = (bound < 2.0 ** (62 + shifts)) & (high < 2**52) & (low < 2**52)
    return np.where(fits, shifts, -1)
