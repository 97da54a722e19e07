"""FedProx with a penalty per client that grows with its distance, and is its weight in the mean.

Bedi et al., "FedBC: Calibrating Global and Local Models via Federated Learning Beyond Consensus",
2022, https://arxiv.org/abs/2206.10815. The problem is to minimise sum_i f_i(w_i) with ||w_i -
w||^2 <= gamma_i. Its Lagrangian has a multiplier lam_i for each client. Client i of a cohort,
which receives w:

    w_i      <-  local SGD on f_i(w_i) + lam_i (||w_i - w||^2 - gamma_i), from w
    lam_i    <-  max(0, lam_i + alpha (||w_i - w||^2 - gamma_i))
    gamma_i  <-  gamma_i + alpha lam_i, with lam_i as before the round     (``learn_gamma``)
    w        <-  sum_i lam_i w_i / sum_i lam_i, with the new lam_i

Clients that move further have more weight. If all lam_i are zero, clients count equally. With
gamma_i = 0 no lam_i ever falls; training is stable while 2 lam_i ``train.lr`` is below 1.

BatchNorm: running statistics are averaged with the same weights; distances do not include them.
Bytes per client and round: all leaves and lam_i up, all leaves down. Deviations: the rounds are
those of the authors' code; the paper's tables could not be read. The code steps one optimiser with
momentum 0.5 over all lam_i once per client, so that lam_i depends on the order of the clients; here
the momentum is 0. Its distances pair parameters and leaves of the state by position, which is wrong
for networks with BatchNorm, and it divides by zero if all lam_i are zero. The paper does not say
what happens to BatchNorm. The logged loss omits lam_i gamma_i, which is constant in a round. The
code also measures each client's last local model; here the accuracy is that of w. Per-FedBC, whose
clients train by MAML, is left out.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables, Visit
from ..components.own_weights import OwnWeights
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import sq_dist
from ..models.network import Model

_LAM, _GAMMA = method_leaf_name("own", "lam"), method_leaf_name("own", "gamma")


@dataclass(frozen=True)
class FedBC(OwnWeights):
    """The personal leaf "own.lam" is lam_i; with ``learn_gamma``, "own.gamma" is gamma_i."""

    lam: float = 0.0  # [1] lam_i of every client before round 1; default: the authors' code
    gamma: float = 0.0  # [||w||^2] gamma_i before round 1; default: the authors' code
    alpha: float = 0.001  # [1] step size of lam_i and gamma_i; default: the authors' code
    # whether gamma_i is learned or stays fixed; default: the authors' code
    learn_gamma: bool = False

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", gamma="[0, inf)", alpha="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        personal = {_LAM: torch.tensor(self.lam)}
        if self.learn_gamma:
            personal[_GAMMA] = torch.tensor(self.gamma)
        return Variables(model.initial, personal)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        base_loss = self.loss(model)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            penalty = start.personal[_LAM] * sq_dist(now.shared, start.shared, parameters)
            return base_loss(now, start, batch) + penalty

        def update_multiplier(start: Variables, now: Variables, data: Batch) -> Variables:
            lam, gamma = start.personal[_LAM], start.personal.get(_GAMMA, self.gamma)
            excess = sq_dist(now.shared, start.shared, parameters) - gamma
            personal = {_LAM: (lam + self.alpha * excess).clamp(min=0)}
            if self.learn_gamma:
                personal[_GAMMA] = gamma + self.alpha * lam
            return Variables(now.shared, personal)

        step = Step(loss, model.leaves.__contains__)
        return Phase(train.epochs, (step,)), Visit(update_multiplier)

    def own_weight(self, v: Variables) -> Tensor:
        return v.personal[_LAM]
