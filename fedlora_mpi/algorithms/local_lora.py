"""FedLoRA's network trained by each client alone: "Local + LoRA" of the paper's Table 4.

Wu et al. (see ``fedlora.py``), Table 4: does the added capacity of tau explain the gain? sigma and
tau_i train as in FedLoRA, eqs. (6) and (7), and nothing is sent:

    theta_i  =  sigma_i + tau_i

BatchNorm: statistics are the client's own. Bytes per client and round: none.
Deviations: the paper does not say whether the parts train in turn or together; ``order`` does.
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import Algorithm, Phase, Train, Vars
from ..components.lowrank import LowRank
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class LocalLoRA(LowRank, Algorithm):
    """All variables are personal."""

    def init(self, model: Model, rng: Generator) -> Vars:
        return Vars(shared={}, personal=model.initial | self.factors(model, rng))

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        return self.turns(model, train, self.loss(model))

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return self.theta(model, v)
