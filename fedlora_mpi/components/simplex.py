"""Weights that are at least 0 and sum to 1: the nearest ones, and those with the least error."""

import torch
from torch import Tensor


def on_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex to each row (Duchi et al., ICML 2008, Fig. 1), [m, n]."""
    falling = rows.sort(1, descending=True).values
    excess = (falling.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1)
    last = (falling > excess).sum(1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp(min=0)


def best_weights(gram: Tensor, variance: Tensor) -> Tensor:
    """Row i: argmin over the simplex of sum_a V_a alpha_a^2 + ||h_i - sum_a alpha_a h_a||^2, [n,
    n].

    The best estimate of h_i from all h, where h_a is known up to the variance V_a. gram: [n, n]
    inner products of the h, of which the mean may be taken off; variance: [n]; both float64. All
    rows together, by projected gradient descent with momentum (FISTA) that starts anew where it
    overshoots (O'Donoghue and Candes, 2015); ends when no row can gain more than 1e-12 of the
    curvature's scale.
    """
    hessian = gram + torch.diag(variance)
    step = 1 / torch.linalg.matrix_norm(hessian, 2).clamp(min=1e-300)

    def slope(alpha):
        return alpha @ hessian - gram  # half the gradient

    alpha = ahead = torch.full_like(gram, 1 / len(gram))
    t = torch.ones(len(gram), 1, dtype=gram.dtype)
    for _ in range(20_000):
        before, alpha = alpha, on_simplex(ahead - step * slope(ahead))
        over = ((ahead - alpha) * (alpha - before)).sum(1, keepdim=True) > 0
        t_next = torch.where(over, 1.0, (1 + (1 + 4 * t.square()).sqrt()) / 2)
        ahead = torch.where(over, alpha, alpha + (t - 1) / t_next * (alpha - before))
        t = t_next
        g = slope(alpha)
        if ((alpha * g).sum(1) - g.amin(1)).max() * step <= 1e-12:
            break
    return alpha
