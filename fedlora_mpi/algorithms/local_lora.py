"""FedLoRA's network trained by each client alone: "Local + LoRA" of the paper's Table 4.

Wu et al. (see ``fedlora.py``), Table 4: this baseline shows how much of the gain comes from the
added capacity of tau. sigma and tau_i train as in FedLoRA, eqs. (6) and (7), and nothing is sent:

    theta_i  =  sigma_i + tau_i

BatchNorm: statistics are the client's own. Bytes per client and round: none. Deviations: the paper
does not say whether the parts train in turn or together; ``order`` selects this.
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import Algorithm, LocalTraining, Phase, Variables
from ..components.lowrank import LowRank
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class LocalLoRA(LowRank, Algorithm):
    """All variables are personal."""

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared={}, personal=model.initial | self.factors(model, rng))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        return self.training_phases(model, train, self.loss(model))

    def client_model(self, model: Model, v: Variables) -> Tree:
        return self.theta(model, v)
