"""How alike clients are, from the Gram matrix of the keys that they show (see ``Algorithm.mix``).

gram: [n, n] inner products <k_i, k_j>, float64. All results are [n, n], float64.
"""

from torch import Tensor


def squared_distances(gram: Tensor) -> Tensor:
    """||k_i - k_j||^2, where rounding never leaves a negative one.

    Of 0/1 masks it is the exact number of entries in which they differ. Of other keys it cancels
    unless their mean has been taken off (``Algorithm.center_keys``), which moves no distance.
    """
    squared_norms = gram.diagonal()
    return (squared_norms[:, None] + squared_norms - 2 * gram).clamp(min=0)


def cosines(gram: Tensor) -> Tensor:
    """cos(k_i, k_j); 0 where a key is zero. For keys whose mean has not been taken off."""
    squared_norms = gram.diagonal()
    return gram / (squared_norms[:, None] * squared_norms).sqrt().clamp(min=1e-300)
