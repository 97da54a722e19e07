"""Shared full-rank weights plus a personal low-rank part; the two parts train in turn.

Wu et al., "FedLoRA: When Personalized Federated Learning Meets Low-Rank Adaptation", ICLR 2024
submission; published as FedDecomp, ACM MM 2024, https://arxiv.org/abs/2406.19931. For client i:

    theta_i = sigma + tau_i              (2)    tau_i = s B_i A_i                   (3)-(5)
    tau_i   <- argmin L_i(tau_i, sigma), lora_epochs epochs, sigma held still       (6)
    sigma_i <- argmin L_i(tau_i, sigma_i), the other epochs, tau_i held still       (7)
    sigma   <- (1/N) sum_i sigma_i                                                  (8)

sigma holds every leaf of the model, including biases and BatchNorm. A_i and B_i never leave the
client.

BatchNorm: affine parameters and running statistics belong to sigma and are averaged. While the
low-rank part trains, the statistics still move but the affine parameters do not. ``bn_stats:
local`` keeps the statistics on the client. Bytes per client and round: all leaves of the model up
and down, independent of the ranks. With ``bn_stats: local`` the statistics are not sent.
Deviations: the paper does not specify the variance of A, the treatment of BatchNorm and the layout
of eq. (5). All three follow the official code (see ``components/lowrank.py``).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator

from ..algorithm import Algorithm, LocalTraining, Phase, Variables
from ..components.lowrank import LowRank
from ..core.tree import Tree, split
from ..models.network import Model


@dataclass(frozen=True)
class FedLoRA(LowRank, Algorithm):
    """sigma is shared, the factors of tau are personal."""

    weights = "uniform"
    # running statistics belong to sigma, or stay on the client; default: the official code
    bn_stats: Literal["shared", "local"] = "shared"
    # default: the official code, whose mean has all clients
    absent: Literal["exclude", "stale"] = "stale"

    def init(self, model: Model, rng: Generator) -> Variables:
        def is_local(leaf):
            return self.bn_stats == "local" and model.role(leaf) == "stats"

        local_stats, sigma = split(model.initial, is_local)
        return Variables(shared=sigma, personal=local_stats | self.factors(model, rng))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        return self.training_phases(model, train, self.loss(model))

    def client_model(self, model: Model, v: Variables) -> Tree:
        return self.theta(model, v)
