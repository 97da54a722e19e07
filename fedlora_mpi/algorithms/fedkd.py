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

from ..algorithm import Batch, Cohort, LocalTraining, Phase, Step, Variables
from ..components.companion import SMALL_PREFIX, Companion
from ..components.lowrank import truncate_svd
from ..core.batch import cross_entropy, kl_divergence, mean
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

_ROUND = method_leaf_name("svd", "round")
_MESSAGE_NUMEL = method_leaf_name("svd", "numbers")
_W_H = method_leaf_name("hidden", "W_h")


@dataclass(frozen=True)
class FedKD(Companion):
    """Shared leaves beside g: "svd.round", the rounds done, and "svd.numbers", how many numbers the
    last message had.
    """

    energy_start: float = 0.95
    energy_end: float = 0.98
    energy_rounds: int = 500
    detached: bool = False

    def __post_init__(self) -> None:
        bounded(self, energy_start="[0, 1]", energy_end="[0, 1]", energy_rounds="[1, inf)")

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
        sizes = torch.tensor(float(sum(v.numel() for v in shared.values())))
        return Variables(
            shared | {_ROUND: torch.tensor(0.0), _MESSAGE_NUMEL: sizes}, personal | {_W_H: W_h}
        )

    def phases(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
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

        return (Phase(train.epochs, (Step(loss, self.trained_leaves(model, _W_H)),)),)

    def finish(
        self, model: Model, train: LocalTraining, start: Variables, end: Variables, data: Batch
    ) -> Variables:
        """Replace the trained g by what the server reconstructs from the client's compressed
        message.
        """
        return end._replace(shared=self.compress_update(start.shared, end.shared))

    def upload(self, start: Variables, end: Variables) -> Tree:
        return {n: v for n, v in end.shared.items() if n.startswith(SMALL_PREFIX)}

    def upload_numel(self, start: Variables, end: Variables) -> Tensor:
        return end.shared[_MESSAGE_NUMEL]

    def download_numel(self, shared: Tree) -> Tensor:
        return shared[_MESSAGE_NUMEL]

    def server_update(
        self, server: Tree, shared: Tree, mean: Tree, cohort: Cohort
    ) -> tuple[Tree, Tree]:
        shared = self.compress_update(shared, mean)
        return server, shared | {_ROUND: shared[_ROUND] + 1}

    def compress_update(self, old: Tree, new: Tree) -> Tree:
        """old + C(new - old) for the leaves of g, and the compressed message's size in numbers."""
        round_ = old[_ROUND]
        share = ((round_.double() + 1) / self.energy_rounds).clamp(max=1)
        energy = self.energy_start + share * (self.energy_end - self.energy_start)  # T_t
        tree, numbers = {}, torch.zeros_like(round_)
        for name, old_value in old.items():
            if name.startswith(SMALL_PREFIX):
                tree[name] = new[name]
                count: Tensor | int = old_value.numel()
                if old_value.dim() > 1:
                    update, count = truncate_svd(new[name] - old_value, energy)
                    tree[name] = old_value + update
                numbers = numbers + count
        return tree | {_ROUND: round_, _MESSAGE_NUMEL: numbers}
