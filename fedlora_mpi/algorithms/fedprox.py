"""FedAvg with a proximal term that keeps each client near the model it received.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127. With w the received model, eq. (2) and Algorithm 2:

    h_k(w_k; w)  =  F_k(w_k) + (mu / 2) ||w_k - w||^2        (2)
    w_k          <-  argmin h_k(w_k; w) from w               w  <-  sum_k (n_k / n) w_k

BatchNorm: running statistics are averaged like every other leaf; the proximal term does not include
them. Bytes per client and round: all leaves up, all leaves down. Deviations: the paper samples
clients with probability n_k / n and averages them equally. Here, as in FedAvg, clients are sampled
uniformly and weighed by n_k. The paper tunes mu over 0.001, 0.01, 0.1 and 1 per data set. Some
public versions omit the square, or measure the distance to the client's own current model, which
has no effect.
"""

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.tree import sq_dist
from ..models.network import Model


@dataclass(frozen=True)
class FedProx(Averaging):
    """FedAvg with another loss."""

    # [1] weight of the proximal term; 0: FedAvg; default: our choice from the grid that the paper
    # tunes, 0.001 to 1
    mu: float = 0.01

    def __post_init__(self) -> None:
        bounded(self, mu="[0, inf)")

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        base_loss = self.loss(model)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return base_loss(now, start, batch) + self.mu / 2 * sq_dist(
                now.shared, start.shared, parameters
            )

        return (Phase(train.epochs, (Step(loss),)),)
