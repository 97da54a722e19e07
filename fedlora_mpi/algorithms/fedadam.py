"""FedAvg whose server steps with Adam along the mean change of the clients.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
Algorithm 2. ``components/server_optimisers.py`` has m and the step itself:

    v  <-  beta2 v + (1 - beta2) Delta^2
    x  <-  x + eta m / (sqrt(v) + tau)

BatchNorm: running statistics are averaged. The server's optimiser updates affine parameters.

Bytes per client and round: all leaves up, all leaves down. The server keeps m and v.

Deviations: v = tau^2 before round 1 and there is no bias correction, as in the paper. The authors'
code is Keras' Adam, which starts at v = 0 and corrects the bias; so does Flower's. FL-bench and
fluke start at v = 0 and use beta2 = 0.999, so that the first step is about eta in every coordinate.
"""

from dataclasses import dataclass

from torch import Tensor

from ..components.server_optimisers import DecayingServer


@dataclass(frozen=True)
class FedAdam(DecayingServer):
    """``DecayingServer`` with Adam's second moment."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square
