"""Matrices sent as their largest singular values, with what they hold of the whole."""

import torch
from torch import Tensor


def truncated(update: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """``update`` [d1, ...] as the receiver has it, and the number n (d1 + d2 + 1) of what is sent, [].

    As a matrix [d1, d2] it is sum_j s_j u_j v_j'; sent are s_j, u_j, v_j for j <= n, n >= 1 the smallest
    number with sum_{j <= n} s_j^2 >= energy sum_j s_j^2. energy: [] float64. In float64 a value below 1e-8 s_1,
    of a matrix without full rank, is lost in the sum, so n is at most the rank. What is not finite
    comes back as it is.
    """
    matrix = update.flatten(1).double()
    finite = matrix.isfinite().all()
    U, s, V = torch.linalg.svd(torch.where(finite, matrix, 0.0), full_matrices=False)  # refuses nan
    held = s.square().cumsum(0)
    enough = held[:-1] >= energy * held[-1]  # without the next ones
    kept = torch.cat([torch.ones_like(finite)[None], ~enough])  # a mask: in a stack every client has its own n
    rest = torch.where(finite, (U * (s * kept)) @ V, matrix)
    return rest.to(update.dtype).view(update.shape), kept.sum() * (sum(matrix.shape) + 1)
