"""FedAvg whose server steps with Adagrad along the mean change of the clients.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
Algorithm 2. ``components/server_optimisers.py`` has m and the step itself:

    v  <-  v + Delta^2
    x  <-  x + eta m / (sqrt(v) + tau)

BatchNorm: running statistics are averaged. The server's optimiser updates affine parameters.

Bytes per client and round: all leaves up, all leaves down. The server keeps m and v.

Deviations: v = tau^2 before round 1, as the paper's Algorithm 2 asks (at least tau^2); the authors'
code starts at v = 0. Flower's Adagrad also has beta1 = 0, and starts at v = 0.
"""

from dataclasses import dataclass

from torch import Tensor

from ..components.server_optimisers import AdaptiveServer


@dataclass(frozen=True)
class FedAdagrad(AdaptiveServer):
    """``AdaptiveServer`` with a sum of squares."""

    beta1: float = 0.0  # default: the paper's experiments

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square
