"""FedAvg whose server applies a Yogi step to the mean change of the clients.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
Algorithm 2; m and the step itself are in ``components/server_optimisers.py``:

    v  <-  v - (1 - beta2) Delta^2 sign(v - Delta^2)
    x  <-  x + eta m / (sqrt(v) + tau)

BatchNorm: running statistics are averaged; affine parameters take the server's step. Bytes per
client and round: all leaves up, all leaves down. The server keeps m and v. Deviations: as in the
paper, v = tau^2 before round 1 and there is no bias correction; the authors' code starts v at 0.
"""

from dataclasses import dataclass

from torch import Tensor

from ..components.server_optimisers import DecayingServer


@dataclass(frozen=True)
class FedYogi(DecayingServer):
    """``DecayingServer`` with Yogi's second moment."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * (v - square).sign()
