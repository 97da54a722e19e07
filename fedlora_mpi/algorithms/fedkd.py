"""Large personal networks and a small shared one teach each other; updates are sent as SVDs.

Wu et al., "Communication-Efficient Federated Learning via Knowledge Distillation", Nature
Communications 2022, https://arxiv.org/abs/2108.13323. Client k has its own network F (the mentor,
t) and a copy of the small network g (the mentee, s). h are the features that enter the head, W_h is
a personal matrix:

    D     =  CE_t + CE_s                          L_h  =  mean (h_t - W_h h_s)^2
    L_t   =  CE_t + (KL(p_s || p_t) + L_h) / D    L_s  =  CE_s + (KL(p_t || p_s) + L_h) / D
    F, W_h, g  <-  descend on L_t + L_s, from the server's g
    g     <-  g + C(mean_k C(g_k - g))

C compresses each matrix [d1, d2] (a convolution is [O, I K1 K2]) to its n largest singular values.
n >= 1 is the smallest number whose squares are at least T_t of the sum of all squares. In round t
(from 0), T_t = T_start + (t + 1) / T (T_end - T_start), with the settings ``energy_start``,
``energy_end`` and, for T, ``energy_rounds``. Vectors are not compressed.

BatchNorm: that of F is personal; running statistics of g are averaged.

Bytes per client and round: 4 (n (d1 + d2 + 1) for each matrix of g, and the numbers of its vectors)
up and down. This can be more than all of g if T_t is near 1. In round 1 all of g comes down. A
client that missed rounds counts as if it had received their updates.

Deviations: gradients flow through the teachers and D, as in the authors' code; ``detached: true``
makes them constants. The authors' code also divides KL by the number of classes, leaves out a
matrix that needs all its singular values, uses Adam, and has a loss term for attention maps.
HtFLlib compresses parameters, not updates.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables, Visit
from ..components.companion import Companion
from ..components.compression import SvdExchange
from ..core.batch import cross_entropy, kl_divergence, mean
from ..core.names import method_leaf_name
from ..models.network import Model

_W_H = method_leaf_name("hidden", "W_h")


@dataclass(frozen=True)
class FedKD(SvdExchange, Companion):
    """The personal leaf "hidden.W_h" is W_h."""

    # whether teachers and D are constants in the losses; default: the authors' code
    detached: bool = False

    def check(self, model: Model, train: LocalTraining) -> None:
        super().check(model, train)
        for which, network in (("name = fedkd", model), (f"small = {self.small}", self.g(model))):
            if not (network.head and network.ends_in_linear):
                raise ValueError(
                    f"{which}: needs a network that ends in a Linear; {network.head or 'this'} is "
                    "none, or not alone and last"
                )

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        (d_t,), (d_s,) = (
            network.leaves[f"{network.head}.weight"].shape[1:] for network in (model, self.g(model))
        )
        W_h = (torch.rand(d_t, d_s, generator=rng) * 2 - 1) / d_s**0.5
        return Variables(shared, personal | {_W_H: W_h})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        g, detach_if_set = self.g(model), Tensor.detach if self.detached else lambda v: v

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            t, s = self.client_model(model, now), self.g_leaves(now)
            h_t = model.features(t, batch.x)
            with self.training_context(model, batch):
                h_s = g.to(batch.x.device).features(s, batch.x)
            o_t, o_s = model.classify(t, h_t), g.classify(s, h_s)
            fit = cross_entropy(o_t, batch) + cross_entropy(o_s, batch)
            gap = kl_divergence(detach_if_set(o_s), o_t) + kl_divergence(detach_if_set(o_t), o_s)
            hidden = (h_t - h_s @ now.personal[_W_H].T).square().mean(1)
            return fit + mean(gap + 2 * hidden, batch) / detach_if_set(fit)  # L_t + L_s

        step = Step(loss, self.trained_leaves(model, _W_H))
        return Phase(train.epochs, (step,)), self.compression(round_)
