"""Similarity of clients, from the Gram matrix of the keys that they send (see ``Algorithm.mix``).

gram: [n, n] inner products <k_i, k_j>, float64. All results are [n, n], float64.
"""

from torch import Tensor


def squared_distances(gram: Tensor) -> Tensor:
    """Return ||k_i - k_j||^2, which rounding never makes negative.

    For 0/1 masks the distance is exact: the number of entries in which they differ. For other keys
    the difference cancels digits unless the keys' mean has been subtracted
    (``Mix.centered``), which changes no distance.
    """
    squared_norms = gram.diagonal()
    return (squared_norms[:, None] + squared_norms - 2 * gram).clamp(min=0)


def cosines(gram: Tensor) -> Tensor:
    """Return cos(k_i, k_j); 0 if a key is zero. The keys' mean must not have been subtracted."""
    squared_norms = gram.diagonal()
    return gram / (squared_norms[:, None] * squared_norms).sqrt().clamp(min=1e-300)
