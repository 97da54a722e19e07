"""Weights that are at least 0 and sum to 1: a projection onto them, those of least error, and those
that favour large numbers within bounds.
"""

import torch
from torch import Tensor


def project_to_simplex(rows: Tensor) -> Tensor:
    """Return the nearest point of the simplex to each row, [m, n].

    Duchi et al., ICML 2008, Fig. 1.
    """
    descending = rows.sort(1, descending=True).values
    excess = (descending.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1)
    support_end = (descending > excess).sum(1, keepdim=True) - 1
    return (rows - excess.gather(1, support_end)).clamp(min=0)


def best_weights(gram: Tensor, variance: Tensor) -> Tensor:
    """Return weights [n, n]; row i is the alpha in the simplex that minimises

        sum_a V_a alpha_a^2 + ||h_i - sum_a alpha_a h_a||^2

    This gives the best estimate of h_i from all h, where h_a is known up to the variance V_a. gram:
    [n, n] inner products of the h, whose mean may have been subtracted; variance: [n]; both
    float64.

    Projected gradient descent with momentum (FISTA) solves all rows together. It restarts a row's
    momentum when that overshoots (O'Donoghue and Candes, 2015). It stops when no row can gain more
    than 1e-12 of the curvature's scale, and at the latest after 20,000 steps.
    """
    hessian = gram + torch.diag(variance)
    step = 1 / torch.linalg.matrix_norm(hessian, 2).clamp(min=1e-300)

    def gradient(alpha):
        return alpha @ hessian - gram  # half the gradient

    alpha = extrapolated = torch.full_like(gram, 1 / len(gram))
    t = torch.ones(len(gram), 1, dtype=gram.dtype)
    for _ in range(20_000):
        previous, alpha = alpha, project_to_simplex(extrapolated - step * gradient(extrapolated))
        is_overshot = ((extrapolated - alpha) * (alpha - previous)).sum(1, keepdim=True) > 0
        t_next = torch.where(is_overshot, 1.0, (1 + (1 + 4 * t.square()).sqrt()) / 2)
        extrapolated = torch.where(
            is_overshot, alpha, alpha + (t - 1) / t_next * (alpha - previous)
        )
        t = t_next
        g = gradient(alpha)
        if ((alpha * g).sum(1) - g.amin(1)).max() * step <= 1e-12:
            break
    return alpha


def favour_largest(values: Tensor, epsilon: float) -> Tensor:
    """Return n lam [n], float64, for the weights lam that maximise sum_k lam_k values_k among those
    that differ from 1 / n by at most ``epsilon``.

    All start at the least weight; the rest goes to the largest values first, as much as each may
    have. Of equal values the first counts as larger. For epsilon = 0 the result is exactly 1.
    """
    n = len(values)
    least, most = max(0.0, 1 - n * epsilon), min(float(n), 1 + n * epsilon)
    given = torch.arange(n, dtype=torch.float64) * (most - least)  # to those before
    shares = (n * (1 - least) - given).clamp(0, most - least)
    descending = values.sort(descending=True, stable=True).indices
    return torch.empty_like(shares).index_copy_(0, descending, least + shares)
