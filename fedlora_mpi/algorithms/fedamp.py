"""Every client has its own model, which is pulled towards a mix of the models of similar clients.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data" (FedAMP), AAAI 2021,
https://arxiv.org/abs/2007.03797. In round t, first the server, then client i:

    u_i  = sum_j xi_ij w_j
    xi_ij = alpha_t A'(||w_i - w_j||^2) for j != i,   xi_ii = 1 - sum_(j != i) xi_ij
    w_i <- argmin F_i(w) + lam / (2 alpha_t) ||w - u_i||^2,    A'(x) = exp(-x / sigma) / sigma
    alpha_t = max(alpha_min, alpha decay^floor(t / decay_every))
    xi_ij = (1 - xi_ii) exp(sigma cos(w_i, w_j)) / sum_(h != i) exp(sigma cos(w_i, w_h))  HeurFedAMP

HeurFedAMP (``heuristic: true``), for deep networks, has xi_ii = self_weight. w_i are the
parameters. Training starts at w_i (``start: own``) or at u_i (``cloud``). The accuracy is that of
w_i after training.

BatchNorm: statistics are personal. They enter neither distances nor mixes. Bytes per client and
round: the parameters up (w_i) and down (u_i). Deviations: the defaults are those of the FedAMP that
FedLoRA's first author contributed to Fling; Fling multiplies alpha by 0.1 one round later. With
sigma = 100 and alpha = 10^4 the weights xi_ij of a row sum to far above 1 and xi_ii is negative;
``convex: true`` scales them down to a sum of 1 (false: as in Fling). SGD on the penalty diverges
once lr lam / alpha >= 2 (1 + momentum), which Fling's schedule reaches in round 181; ``alpha_min``
prevents this (0: no bound, as in Fling). In PFLlib the penalty has no gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, LocalTraining, Mix, Phase, Step, Upload, Variables, Visit
from ..components.similarity import cosines, squared_distances
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import select_prefix, sq_dist
from ..models.network import Model

_CLOUD = method_leaf_name("cloud")


@dataclass(frozen=True)
class FedAMP(Algorithm):
    """The personal leaves "cloud.<leaf>" are u_i."""

    evaluate_on = "after_training"
    lam: float = 1.0  # [1] weight of the pull towards u_i; default: Fling's
    alpha: float = 1e4  # [1] alpha_t in the first rounds; default: Fling's
    decay: float = 0.1  # [1] factor of alpha_t every decay_every rounds; default: Fling's
    decay_every: int = 30  # [rounds] time between two decays; default: Fling's
    # [1] least alpha_t, 0: none; default: our choice, stable at lr 0.1 with momentum 0.9
    alpha_min: float = 0.05
    # [squared distance] where A' falls to 1/e; HeurFedAMP: factor of cosines; default: Fling's
    sigma: float = 100.0
    convex: bool = True  # whether xi_ii stays at least 0; default: our choice (Fling: false)
    heuristic: bool = False  # whether xi_ij is HeurFedAMP's; default: Fling's
    self_weight: float = 0.0  # [1] HeurFedAMP's xi_ii, 0: 1 / clients; default: easyFL's
    # where local training starts, at w_i or at u_i; default: Fling's
    start: Literal["own", "cloud"] = "own"

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", alpha="(0, inf)", decay="(0, 1]", decay_every="[1, inf)")
        bounded(self, alpha_min="[0, inf)", sigma="(0, inf)", self_weight="[0, 1]")

    def check(self, model: Model, train: LocalTraining) -> None:
        lower_bound = train.lr * self.lam / (2 * (1 + train.momentum))
        if 0 < self.alpha_min <= lower_bound:
            requirement = (
                f"must be above lr lam / (2 (1 + momentum)) = {lower_bound:.3g} (or 0: no bound)"
            )
            raise ValueError(
                f"alpha_min = {self.alpha_min}: {requirement}, or SGD on the penalty diverges"
            )

    def alpha_of(self, round_: int) -> float:
        """alpha_t of round ``round_`` (from 0)."""
        return max(self.alpha_min, self.alpha * self.decay ** (round_ // self.decay_every))

    def init(self, model: Model, rng: Generator) -> Variables:
        cloud = {_CLOUD + n: w for n, w in model.initial.items() if model.role(n) != "stats"}
        return Variables(shared={}, personal=model.initial | cloud)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        fit, strength = self.loss(model), self.lam / (2 * self.alpha_of(round_))

        def take_cloud(start: Variables, now: Variables, data: Batch) -> Variables:
            return now._replace(personal=now.personal | select_prefix(now.personal, _CLOUD))

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            u = select_prefix(now.personal, _CLOUD)
            return fit(now, start, batch) + strength * sq_dist(now.personal, u, u)

        phase = Phase(train.epochs, (Step(loss, model.leaves.__contains__),))
        return (phase,) if self.start == "own" else (Visit(take_cloud), phase)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        rows = {_CLOUD + n: end.personal[n] for n in select_prefix(end.personal, _CLOUD)}
        # centring changes cosines, but not distances
        return Upload(mix=Mix(rows, centered=not self.heuristic))

    def mix(self, gram: Tensor, extra: Tensor, round_: int) -> Tensor:
        if self.heuristic:
            own_weight = self.self_weight or 1 / len(gram)
            similarity = (self.sigma * cosines(gram)).fill_diagonal_(-torch.inf)
            xi = (1 - own_weight) * similarity.softmax(1)
        else:
            similarity = torch.exp(-squared_distances(gram) / self.sigma).fill_diagonal_(0)
            xi = self.alpha_of(round_ + 1) * similarity / self.sigma  # of the round that begins
            xi = xi / xi.sum(1, keepdim=True).clamp(min=1) if self.convex else xi
        return xi + torch.diag(1 - xi.sum(1))
