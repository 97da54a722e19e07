"""How alike clients are, from the Gram matrix of the keys that they show (see ``Algorithm.mix``).

gram: [n, n] inner products <k_i, k_j>, float64. All results are [n, n], float64.
"""

from torch import Tensor


def distances(gram: Tensor) -> Tensor:
    """||k_i - k_j||^2, where rounding never leaves a negative one.

    Of 0/1 masks it is the exact number of entries in which they differ. Of other keys it cancels
    unless their mean has been taken off (``Algorithm.centred``), which moves no distance.
    """
    square = gram.diagonal()
    return (square[:, None] + square - 2 * gram).clamp(min=0)


def cosines(gram: Tensor) -> Tensor:
    """cos(k_i, k_j); 0 where a key is zero. For keys whose mean has not been taken off."""
    square = gram.diagonal()
    return gram / (square[:, None] * square).sqrt().clamp(min=1e-300)
