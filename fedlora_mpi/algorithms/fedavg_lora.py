"""FedLoRA's network with everything shared: "FedAvg + LoRA" of the paper's Table 4.

Wu et al. (see ``fedlora.py``), Table 4. It tests whether the added capacity of tau explains
FedLoRA's gain. sigma, A and B train as in FedLoRA, eqs. (6) and (7), and each is averaged:

    sigma <- (1/N) sum_i sigma_i        A <- (1/N) sum_i A_i        B <- (1/N) sum_i B_i

BatchNorm: running statistics are averaged.

Bytes per client and round: all leaves of the model and all factors, up and down.

Deviations: the paper does not say how the low-rank part is averaged; here A and B are averaged
separately.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator

from ..algorithm import Algorithm, LocalTraining, Phase, Variables
from ..components.lowrank import LowRank
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class FedAvgLoRA(LowRank, Algorithm):
    """All variables are shared."""

    weights = "uniform"
    # default: the official code of FedLoRA, whose mean has all clients
    absent: Literal["exclude", "stale"] = "stale"

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared=model.initial | self.factors(model, rng), personal={})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        return self.training_phases(model, train, self.loss(model))

    def client_model(self, model: Model, v: Variables) -> Tree:
        return self.theta(model, v)
