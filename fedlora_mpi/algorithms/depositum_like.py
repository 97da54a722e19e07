"""Clients of a graph track the mean gradient, and a momentum of it drives a proximal step.

Zhou et al., "Decentralized Nonconvex Composite Federated Learning with Gradient Tracking and
Momentum" (DEPOSITUM), 2025, https://arxiv.org/abs/2504.12742. It minimises (1/N) sum_i f_i(x) +
h(x) over the config's ``topology``. On every batch, client i, with alpha = ``train.lr``:

    y_i  <- y_i + beta (g_i' - g_i),   g_i <- g_i',   g_i' = grad f_i(x_i) on the batch
    nu_i <- gamma nu_i + (1 - gamma) y_i,   d_i = nu_i                        (heavy_ball)
                                            d_i = gamma nu_i + (1 - gamma) y_i  (nesterov)
    x_i  <- prox(x_i - alpha d_i)

After the batches of a round x_i becomes sum_j W_ij x_j, and y_i sum_j W_ij y_j. All but x_i start
at 0, so sum_i y_i = beta sum_i g_i at all times, for any W, and when clients are absent.

h is 0, lam |v| (l1), or the minimax concave penalty of lam and theta (mcp). For each number v prox
is sign(v) max(|v| - alpha lam, 0), with mcp divided by 1 - alpha / theta, or v from theta lam on.

BatchNorm: statistics are mixed with W. Bytes per client and round: x_i and y_i to each neighbour.

Deviations: only the abstract was available: gradient tracking, its momentum in a proximal step,
several steps between exchanges, a weakly convex h. The rest of DEPOSITUM-like is reconstructed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, LocalTraining, Loss, Mix, Phase, Sgd, Step, Upload, Variables
from ..core.batch import Batch
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import select_prefix, sq_dist
from ..models.network import Model

_Y, _G, _NU = (method_leaf_name(name) for name in ("tracked", "gradient", "momentum"))


@dataclass(frozen=True)
class DepositumLike(Algorithm):
    """The leaves "tracked.", "gradient." and "momentum.<leaf>" are y_i, g_i and nu_i."""

    weights = "uniform"
    gamma: float = 0.8  # [1] share of nu_i that stays; default: our choice, a usual momentum
    beta: float = 1.0  # [1] scale of the gradients in y_i; default: our choice, plain tracking
    momentum: Literal["heavy_ball", "nesterov"] = "heavy_ball"  # d_i; default: our choice
    penalty: Literal["none", "l1", "mcp"] = "none"  # h; default: our choice, for comparisons
    lam: float = 1e-4  # [1] weight of h; default: our choice, that of a usual weight decay
    theta: float = 4.0  # [1] mcp shrinks numbers below theta lam; default: our choice

    def __post_init__(self) -> None:
        bounded(self, gamma="[0, 1)", beta="(0, inf)", lam="[0, inf)", theta="(0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        for field in ("momentum", "weight_decay"):
            if value := getattr(train, field):
                key = f"name = depositum_like: needs train.{field} = 0, not {value}"
                raise ValueError(f"{key}: it has a momentum and a penalty of its own")
        if self.penalty == "mcp" and self.theta <= train.lr:
            raise ValueError(f"theta = {self.theta}: must be above train.lr = {train.lr}")

    def init(self, model: Model, rng: Generator) -> Variables:
        x = {n: v for n, v in model.initial.items() if model.role(n) != "stats"}
        own = {at + n: torch.zeros_like(v) for at in (_Y, _G, _NU) for n, v in x.items()}
        return Variables({}, model.initial | own)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        fit = self.loss(model)

        def track(now: Variables, start: Variables, batch: Batch) -> Tensor:
            """Its step adds beta (g' - g) to y and makes g' of g; its value is the loss at x."""
            v = now.personal
            y, g = select_prefix(v, _Y), select_prefix(v, _G)
            zero = {n: self.beta * (y[n] - y[n].detach()) + g[n] - g[n].detach() for n in y}
            x = {n: v[n].detach() + zero[n] for n in y}
            loss = fit(now._replace(personal=v | x), start, batch)
            old = sum((self.beta * y[n] * g[n].detach() + g[n] ** 2 / 2).sum() for n in y)
            return old - loss + (2 * loss - old).detach()

        def move_momentum(now: Variables, start: Variables, batch: Batch) -> Tensor:
            y, nu = (select_prefix(now.personal, prefix) for prefix in (_Y, _NU))
            return sq_dist(nu, {n: torch.lerp(y[n], nu[n], self.gamma).detach() for n in y}) / 2

        def move_x(now: Variables, start: Variables, batch: Batch) -> Tensor:
            y, d = (select_prefix(now.personal, prefix) for prefix in (_Y, _NU))
            if self.momentum == "nesterov":
                d = {n: torch.lerp(y[n], d[n], self.gamma) for n in y}
            x = {n: self.prox(now.personal[n] - train.lr * d[n], train.lr).detach() for n in y}
            return sq_dist(now.personal, x, y) / 2

        def step(loss: Loss, *leaves: str) -> Step:  # of lr 1: the target of sq_dist / 2
            return Step(loss, lambda leaf: leaf.startswith(leaves), lambda sgd: Sgd(1.0))

        steps = step(track, _Y, _G), step(move_momentum, _NU), step(move_x, *model.leaves)
        return (Phase(train.epochs, steps),)

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        """prox of alpha h, number by number."""
        if self.penalty == "none":
            return v
        shrunk = v.sign() * (v.abs() - alpha * self.lam).clamp(min=0)
        if self.penalty == "l1":
            return shrunk
        return torch.where(v.abs() <= self.theta * self.lam, shrunk / (1 - alpha / self.theta), v)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        rows = {n: v for n, v in end.personal.items() if not n.startswith((_G, _NU))}
        return Upload(mix=Mix(rows, over_topology=True))
