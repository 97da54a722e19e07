"""FedAvg whose server steps with momentum along the mean change of the clients.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, https://arxiv.org/abs/1909.06335, section 4.3. The clients' models w_k are
trained from w:

    Delta  =  sum_k (n_k / n) (w_k - w)
    v  <-  beta v + Delta                   v = 0 before round 1
    w  <-  w + eta v

BatchNorm: running statistics are averaged. The server's optimiser updates affine parameters.

Bytes per client and round: all leaves up, all leaves down. The server keeps v.

Deviations: v is as in torch.optim.SGD; FL-bench steps along beta v + Delta (Nesterov).
"""

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Aggregate, Svd, Update
from ..components.averaging import Weighting
from ..components.server_optimisers import init_moments, step_server
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class FedAvgM(Weighting):
    """If Delta stays the same, the step grows to 1 / (1 - beta) times eta Delta. With beta 0.9, eta
    1 is therefore large.
    """

    eta: float = 1.0  # [1] step of the server along v; default: our choice, FedAvg with beta 0
    beta: float = 0.9  # [1] momentum of the server; default: our choice, the momentum of ``train``

    def __post_init__(self) -> None:
        bounded(self, eta="(0, inf)", beta="[0, 1)")

    def server(self, model: Model, shared: Tree) -> Tree:
        return init_moments(model, shared, v=0.0)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        def step(delta: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            v = self.beta * v + delta
            return self.eta * v, {"v": v}

        return step_server(server, shared, aggregate.mean, step)
