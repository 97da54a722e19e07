"""FedAvg whose server steps with Yogi along the mean change of the clients.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
Algorithm 2; m and the step itself are in ``server_step.py``:

    v  <-  v - (1 - beta2) Delta^2 sign(v - Delta^2)
    x  <-  x + eta m / (sqrt(v) + tau)

BatchNorm: running statistics are the mean's; affine parameters are stepped.
Bytes per client and round: all leaves up, all leaves down. The server keeps m and v.
Deviations: v = tau^2 before round 1 and no correction of the bias, as the paper; the authors' code
starts at 0.
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from ..algorithm import Algorithm, Phase, Step, Train, Vars
from ..losses import own_loss
from ..models.network import Model
from ..server_step import Adaptive, below_one
from ..tree import Tree


@dataclass(frozen=True)
class FedYogi(Adaptive, Algorithm):
    """beta1 and beta2 as in the paper's experiments."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("beta2", self.beta2)

    def init(self, model: Model, rng: Generator) -> Vars:
        return Vars(shared=model.initial, personal={})

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        return (Phase(train.epochs, (Step(own_loss(self, model)),)),)

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return v.shared

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * (v - square).sign()
