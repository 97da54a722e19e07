"""A shared network whose blocks of weights each client's own gate scales, and drops under a budget.

Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation" (pFedGate),
ICML 2023, https://arxiv.org/abs/2305.02776. Each parameter tensor of theta is cut into at most
``blocks`` runs of equal length, L runs in all. The gate phi_i sees a batch of inputs x:

    g(x) = sigmoid(BatchNorm(W SwitchNorm(x))) in (0, 1)^L      M = mean over the batch of g(x)
    theta_i = theta * M, run by run;  theta and phi_i descend on CE(theta_i) at once, phi_i with gate_lr
    theta <- sum_i (n_i / n) theta_i;  phi_i never leaves client i

Sparsity s < 1: with s_min = min(max(1 / blocks, 0.1), s) the first run of every tensor stays; of
the others, Linear layers and the rest apart, those with the largest round(10 max(M, s_min)) stay
that still fit into round((s - s_min) sum of their sizes), taken greedily. Dropped runs count as
zero. ``straight_through``: runs that stay are also multiplied by 1 + p - sg(p), p = max(M, s_min),
as in the official code; false: the choice is a constant. Accuracy is that after training.
BatchNorm: the network's affine parameters are scaled like all others, its statistics averaged; the
gate's own are the client's. Bytes per client and round: all leaves of the model up and down,
whatever s. Deviations: the client predicts with one M, of all its training samples
(client_level_adapt of the official code); that code's M is of each batch of test samples, so that a
prediction depends on its neighbours. Not there: clipping of gradient norms at 10, a separate layer
for the multipliers (seperate_trans), the ReLU on the logits, and the biases of W and of SwitchNorm,
which BatchNorm takes off again. Ties are broken by position.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, Phase, Step, Train, Vars
from ..components.gating import GATE, SEEN, cuts, new_gate, open_gate, runs, scaled, within_budget
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model

_M = SEEN + "M"


@dataclass(frozen=True)
class PFedGate(Algorithm):
    """``absent: stale``, as in the official code. ``sparsity``: s, the share of weights kept."""

    evaluates: ClassVar = "after_training"
    surveys: ClassVar = True
    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "stale"
    sparsity: float = 1.0
    gate_lr: float = 0.1
    blocks: int = 5
    straight_through: bool = True

    def __post_init__(self) -> None:
        bounded(self, sparsity="(0, 1]", gate_lr="(0, inf)", blocks="[1, inf)")

    def check(self, model: Model, train: Train) -> None:
        if len(model.shape) != 3:
            raise ValueError(
                f"name = pfedgate: needs images, not inputs of shape {list(model.shape)}"
            )

    def init(self, model: Model, rng: Generator) -> Vars:
        L = runs(cuts(model, self.blocks))
        return Vars(model.initial, new_gate(model.shape, L, rng) | {_M: torch.full((L,), 0.5)})

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        faster = self.gate_lr / train.lr

        # w with that many times its gradient
        def hurried(w):
            return w.detach() + faster * (w - w.detach())

        def loss(now: Vars, start: Vars, batch: Batch) -> Tensor:
            own = {n: hurried(w) if n.startswith(GATE) else w for n, w in now.personal.items()}
            theta = self.adapted(model, now.shared, self.multipliers(model, own, batch))
            return cross_entropy(model(theta, batch.x), batch)

        return (Phase(train.epochs, (Step(loss, lambda leaf: not leaf.startswith(SEEN)),)),)

    def finish(self, model: Model, train: Train, start: Vars, end: Vars, data: Batch) -> Vars:
        M = self.multipliers(model.evaluating(), end.personal, data)
        return end._replace(personal=end.personal | {_M: M})

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return self.adapted(model, v.shared, v.personal[_M])

    def adapted(self, model: Model, theta: Tree, M: Tensor) -> Tree:
        """theta_i: every run of every tensor times its number of M [L]."""
        return scaled(theta, cuts(model, self.blocks), M)

    def multipliers(self, model: Model, personal: Tree, batch: Batch) -> Tensor:
        """M [L], zero where a run is dropped. In training mode the gate's statistics move."""
        M = open_gate(personal, batch.x, batch.real, model.training)
        if self.sparsity == 1:
            return M
        least = min(max(1 / self.blocks, 0.1), self.sparsity)
        p = M.clamp(min=least)
        stays = within_budget(cuts(model, self.blocks), p.detach(), self.sparsity - least)
        return M * stays * (1 + (p - p.detach()) if self.straight_through else 1)
