"""Every client has its own model, which is pulled towards a mix of the models of similar clients.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data" (FedAMP), AAAI 2021,
https://arxiv.org/abs/2007.03797. In round t, first the server, then client i:

    u_i  = sum_j xi_ij w_j
    xi_ij = alpha_t A'(||w_i - w_j||^2) for j != i,   xi_ii = 1 - sum_(j != i) xi_ij
    w_i <- argmin F_i(w) + lam / (2 alpha_t) ||w - u_i||^2,    A'(x) = exp(-x / sigma) / sigma
    alpha_t = max(alpha_min, alpha decay^floor(t / decay_every))
    xi_ij = (1 - xi_ii) exp(sigma cos(w_i, w_j)) / sum_(h != i) exp(sigma cos(w_i, w_h))  HeurFedAMP

HeurFedAMP (``heuristic: true``), for deep networks, has xi_ii = self_weight (easyFL: sigma 25).
Training starts at w_i (``start: own``) or at u_i (``cloud``). For every alpha_t, w_i is first
pulled by (lam / alpha_t) (w_i - u_i) = lam sum_j A'(d_ij) (w_i - w_j). This is at most lam (N - 1)
/ sqrt(2 e sigma): clients that overshoot each other pull less. SGD is stable on the penalty if
lr lam / alpha_t < 2 (1 + momentum), hence ``alpha_min`` (Fling has none).

BatchNorm: statistics are personal and not mixed. Bytes per client and round: the parameters up
(w_i) and down (u_i). Deviations: the defaults are those of the FedAMP that FedLoRA's first author
contributed to Fling. There alpha falls one round later, while u_i still has the former alpha: a
pull 10 times as strong (``cloud_alpha: previous``). ``convex: true`` scales the xi_ij of a row,
which sum to far above 1, down to 1: almost Local while alpha is large.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, LocalTraining, Mix, Phase, Step, Upload, Variables, Visit
from ..components.similarity import attention, cosine_attention
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import add_prefix, select_prefix, sq_dist
from ..models.network import Model

_CLOUD = method_leaf_name("cloud")


@dataclass(frozen=True)
class FedAMP(Algorithm):
    """The personal leaves "cloud.<leaf>" hold u_i (for alpha_t = 1 where alpha_t scales it)."""

    evaluate_on = "after_training"
    lam: float = 1.0  # [1] weight of the pull towards u_i; default: Fling's
    alpha: float = 1e4  # [1] alpha_t in the first rounds; default: Fling's
    decay: float = 0.1  # [1] factor of alpha_t every decay_every rounds; default: Fling's
    decay_every: int = 30  # [rounds] time between two decays; default: Fling's
    # [1] least alpha_t, 0: none; default: our choice, so that SGD is stable
    alpha_min: float = 0.05
    sigma: float = 100.0  # [squared distance] width of A, or factor of cosines; default: Fling's
    convex: bool = False  # whether xi_ii stays at least 0; default: Fling's
    cloud_alpha: Literal["current", "previous"] = "current"  # alpha of u_i; default: the paper
    heuristic: bool = False  # whether xi_ij is HeurFedAMP's; default: Fling's
    self_weight: float = 0.0  # [1] HeurFedAMP's xi_ii, 0: 1 / clients; default: easyFL's
    start: Literal["own", "cloud"] = "own"  # where training starts, w_i or u_i; default: Fling's

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", alpha="(0, inf)", decay="(0, 1]", decay_every="[1, inf)")
        bounded(self, alpha_min="[0, inf)", sigma="(0, inf)", self_weight="[0, 1]")

    def check(self, model: Model, train: LocalTraining) -> None:
        bound = train.lr * self.lam / (2 * (1 + train.momentum))
        if 0 < self.alpha_min <= bound:
            rule = f"must be above lr lam / (2 (1 + momentum)) = {bound:.3g} (or 0: no bound)"
            raise ValueError(f"alpha_min = {self.alpha_min}: {rule}, or the penalty diverges")

    def alpha_of(self, round_: int) -> float:
        """alpha_t of round ``round_`` (from 0)."""
        return max(self.alpha_min, self.alpha * self.decay ** (round_ // self.decay_every))

    def init(self, model: Model, rng: Generator) -> Variables:
        cloud = {_CLOUD + n: w for n, w in model.initial.items() if model.role(n) != "stats"}
        return Variables(shared={}, personal=model.initial | cloud)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        fit, alpha = self.loss(model), self.alpha_of(round_)
        scale = alpha if self._scales_u else 1.0  # u_i = w_i + scale (cloud - w_i)

        def move_to_cloud(start: Variables, now: Variables, data: Batch) -> Variables:
            cloud = select_prefix(now.personal, _CLOUD)
            u = {n: torch.lerp(now.personal[n], v, scale) for n, v in cloud.items()}
            return now._replace(personal=now.personal | u | add_prefix(u, _CLOUD))

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            # ||w - u_i||^2 - ||w_i - u_i||^2 without u_i, which may be as large as alpha_t
            w, w_i, cloud = now.personal, start.personal, select_prefix(now.personal, _CLOUD)
            pull = sum(((w[n] - w_i[n]) * (v - w_i[n])).sum() for n, v in cloud.items())
            penalty = sq_dist(w, w_i, cloud) / (2 * alpha) - scale / alpha * pull
            return fit(now, start, batch) + self.lam * penalty

        training = Phase(train.epochs, (Step(loss, model.leaves.__contains__),))
        return (Visit(move_to_cloud), training) if self.start == "cloud" else (training,)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        rows = {_CLOUD + n: end.personal[n] for n in select_prefix(end.personal, _CLOUD)}
        return Upload(mix=Mix(rows, centered=not self.heuristic))  # centring changes cosines

    def mix(self, gram: Tensor, extra: Tensor, round_: int) -> Tensor:
        if self.heuristic:
            return cosine_attention(gram, self.sigma, self.self_weight)
        alpha = self.alpha_of(round_ + (self.cloud_alpha == "current"))  # that of the next round
        return attention(gram, 1.0 if self._scales_u else alpha, self.sigma, self.convex)

    @property
    def _scales_u(self) -> bool:
        """Whether ``cloud`` is u_i for alpha_t = 1."""
        return self.cloud_alpha == "current" and not (self.convex or self.heuristic)
