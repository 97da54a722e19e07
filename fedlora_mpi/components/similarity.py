"""Similarity of clients, from the Gram matrix of the keys that they send (see ``Algorithm.mix``).

gram: [n, n] inner products <k_i, k_j>, float64. All results are [n, n], float64.
"""

import torch
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


def attention(gram: Tensor, alpha: float, sigma: float, convex: bool) -> Tensor:
    """Return FedAMP's xi: xi_ij = alpha exp(-||k_i - k_j||^2 / sigma) / sigma for j != i, and xi_ii
    such that a row sums to 1. ``convex`` scales the xi_ij of a row down to a sum of at most 1.
    """
    xi = alpha * torch.exp(-squared_distances(gram) / sigma).fill_diagonal_(0) / sigma
    return _fill_up(xi / xi.sum(1, keepdim=True).clamp(min=1) if convex else xi)


def cosine_attention(gram: Tensor, sigma: float, own_weight: float) -> Tensor:
    """Return HeurFedAMP's xi: xi_ii = own_weight (0 stands for 1 / n), and for j != i the rest
    times the softmax of sigma cos(k_i, k_j) over these j.
    """
    similarity = (sigma * cosines(gram)).fill_diagonal_(-torch.inf)
    return _fill_up((1 - (own_weight or 1 / len(gram))) * similarity.softmax(1))


def _fill_up(xi: Tensor) -> Tensor:
    """Return ``xi``, whose diagonal is 0, with a diagonal that makes every row sum to 1."""
    return xi + torch.diag(1 - xi.sum(1))
