"""Aggregation weights of clients by what truncation to their rank takes from the server's update.

t_r = ||W - W^r||^2 = sum_{j > r} s_j^2, with the singular values s_j of the dense update W.
"""

from typing import Literal, cast

import torch
from torch import Tensor

from ...core.tree import Tree

WeightMode = Literal["drift", "samples", "uniform", "inverse", "fedhera", "fedhera_samples"]
WITHOUT_SAMPLES = ("uniform", "inverse", "fedhera")  # modes in which n_k does not count
UNBOUNDED = ("inverse", "fedhera", "fedhera_samples")  # modes in which only eps bounds a weight


def tail_energies(W: Tensor, B: Tensor) -> Tensor:
    """[R + 1]: sum_{j > r} s_j^2 of W for r = 0 to R. s_j is the norm of column j of B = U S."""
    squares = B.double().square().sum(0)
    energies = W.double().square().sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return energies.clamp(min=0).to(W.dtype)


def tails_of_rank(tails: Tree, r: int, per_layer: bool) -> Tree:
    """Return {weight: [3]}: t_r, t of the largest rank, and ||W||^2 = t_0.

    tails: {weight: its ``tail_energies``}. Without ``per_layer`` all weights have the sums over
    layers.
    """
    parts = {
        n: torch.stack([tail[min(r, len(tail) - 1)], tail[-1], tail[0]])
        for n, tail in tails.items()
    }
    return parts if per_layer else dict.fromkeys(parts, cast(Tensor, sum(parts.values())))


def rank_weight(
    mode: WeightMode, part: Tensor, tau: float, eps: float, eps_relative: float
) -> Tensor:
    """Return the factor of a client's weight that depends on its rank, [], relative to that of the
    largest rank, so at most 1. Before round 1, when W is zero, it is 1.

    part: t, t of the largest rank and ||W||^2, as in ``tails_of_rank``.
    """
    if mode in ("samples", "uniform"):
        return torch.ones_like(part[0])
    if mode == "drift":
        eps, eps_relative = torch.finfo(torch.float64).tiny, tau
    tail, min_tail, total = part.double().square() if "fedhera" in mode else part.double()
    e = eps + eps_relative * total
    return ((min_tail + e) / (tail + e)).to(part.dtype)
