"""FedAvg whose upper layers also train on features drawn from a distribution that clients share.

Tang et al., "FedImpro: Measuring and Improving Client Update in Federated Learning", ICLR 2024,
https://arxiv.org/abs/2402.07011, Algorithm 1, eqs. (6) and (7). The network is psi(phi(x)), cut at
``split``. A class c has the means mu_c and variances sigma_c of the features h = phi(x). In every
local step, with hhat drawn from N(mu_y, diag(sigma_y)) of what the client received:

    loss      =   f(psi(phi(x)), y) + weight f(psi(hhat), y)       as many hhat as examples
    mu_c,i   <-   beta_m mu_c,i + (1 - beta_m) mean(h | y = c)     sigma alike, by the variance (6)
    theta    <-   sum_i (n_i / n) theta_i
    mu_c     <-   beta_g mu_c + (1 - beta_g) mean mu_c,i           sigma alike, uniform means   (7)

``variant: code`` is the authors' code: sigma is a standard deviation, of at most 0.1; beta_m is
1 - D / 5000, at least 0, for D entries of h; beta_g = 0; the labels of hhat are 0, 1, 2, ... in
turn. Its CIFAR recipe has the weight t / 500 in round t, not bounded: ``growth_rounds: 500``. The
paper cuts ResNet-18 after its second stage.

BatchNorm: running statistics are averaged; above the cut a batch holds both kinds of features, as
in the code. Bytes per client and round: all leaves, mu and sigma, up and down. Deviations: no noise
on what is sent (by default the code has none). The paper gives no beta_m, beta_g and start; the
start is the code's, mu from U[0, 1) and a deviation of 0.1. For B examples of C classes the code
draws (floor(B / C) + 1) C features, here B. A class that a client lacks counts in (7) as received.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import (
    Aggregate,
    Batch,
    LocalTraining,
    Phase,
    Step,
    Svd,
    Transport,
    Update,
    Variables,
)
from ..components import feature_moments as moments
from ..components.averaging import Weighting
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class FedImpro(Weighting):
    """The shared leaves "feature.means" and "feature.spreads" are mu and sigma of all classes."""

    needs_class_labels = True
    # name of the module whose output is h, in quotes if it is a number; "": what enters the head;
    # default: our choice, which every network has
    split: str = ""
    # the paper's equations, or the authors' code; default: the paper
    variant: Literal["paper", "code"] = "paper"
    weight: float = 1.0  # [1] weight of the loss on drawn features; default: the paper's
    # [rounds] the weight is weight t / growth_rounds in round t, counted from 0; 0: it is constant;
    # default: the paper's
    growth_rounds: int = 0
    beta_m: float = 0.9  # [1] share of a client's moments that stays per step; default: our choice
    beta_g: float = 0.9  # [1] share of the server's that stays per round; default: our choice

    def __post_init__(self) -> None:
        bounded(self, weight="[0, inf)", growth_rounds="[0, inf)", beta_m="[0, 1)", beta_g="[0, 1)")

    @property
    def spread(self) -> moments.Spread:
        return "variance" if self.variant == "paper" else "deviation"

    def check(self, model: Model, train: LocalTraining) -> None:
        moments.feature_shape(model, self.split)

    def init(self, model: Model, rng: Generator) -> Variables:
        first = moments.first_moments(model, self.split, self.spread, rng)
        return Variables(model.initial | first, {})

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, expand=moments.weigh_moments_alike)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        weight = self.weight * (round_ / self.growth_rounds if self.growth_rounds else 1)
        from_paper = self.variant == "paper"

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            in_turn = torch.arange(len(batch.y), device=batch.y.device) % model.classes
            y = batch.y if from_paper else in_turn
            drawn = moments.draw_features(start.shared, y, batch.key, self.spread)
            beta = self.beta_m if from_paper else max(0.0, 1 - drawn[0].numel() / 5000)

            def add_drawn(h: Tensor) -> Tensor:
                moments.follow_features(now.shared, h, batch, beta, self.spread)
                return torch.stack([h, drawn.to(h)], 1).flatten(0, 1) if weight else h

            tree = self.client_model(model, now)
            logits = model.replace_output(tree, batch.x, self.split, add_drawn)
            if not weight:
                return model.loss(logits, batch)
            drawn_loss = model.loss(logits[1::2], batch._replace(y=y))
            return model.loss(logits[::2], batch) + weight * drawn_loss

        return (Phase(train.epochs, (Step(loss, model.leaves.__contains__),)),)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        mean, beta = aggregate.mean, self.beta_g if self.variant == "paper" else 0.0
        mixed = {n: torch.lerp(mean[n], shared[n], beta) for n in (moments.MEANS, moments.SPREADS)}
        return Update(mean | mixed)
