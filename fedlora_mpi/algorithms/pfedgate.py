"""A shared network whose blocks of weights each client's own gate scales, and drops under a budget.

Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation" (pFedGate),
ICML 2023, https://arxiv.org/abs/2305.02776. Each parameter tensor of theta is cut into at most
``blocks`` runs of equal length, L runs in all. The gate phi_i sees a batch of inputs x:

    g(x) = sigmoid(BatchNorm(W SwitchNorm(x))) in (0, 1)^L      M = mean over the batch of g(x)
    theta_i = theta * M, run by run
    theta, phi_i <- descend on CE(theta_i) at once, phi_i with gate_lr
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
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, LocalTraining, Phase, Step, Variables
from ..components.gating import (
    GATE_PREFIX,
    STATS_PREFIX,
    count_runs,
    cut_tensors,
    gate_values,
    init_gate,
    scale_runs,
    select_runs,
)
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model

_M = STATS_PREFIX + "M"


@dataclass(frozen=True)
class PFedGate(Algorithm):
    """``absent: stale``, as in the official code. ``sparsity``: s, the share of weights kept."""

    evaluate_on = "after_training"
    needs_all_data = True
    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "stale"
    sparsity: float = 1.0
    gate_lr: float = 0.1
    blocks: int = 5
    straight_through: bool = True

    def __post_init__(self) -> None:
        bounded(self, sparsity="(0, 1]", gate_lr="(0, inf)", blocks="[1, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if len(model.shape) != 3:
            raise ValueError(
                f"name = pfedgate: needs images, not inputs of shape {list(model.shape)}"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        L = count_runs(cut_tensors(model, self.blocks))
        return Variables(
            model.initial, init_gate(model.shape, L, rng) | {_M: torch.full((L,), 0.5)}
        )

    def phases(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        lr_ratio = self.gate_lr / train.lr

        # w with that many times its gradient
        def scale_gradient(w):
            return w.detach() + lr_ratio * (w - w.detach())

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            personal = {
                n: scale_gradient(w) if n.startswith(GATE_PREFIX) else w
                for n, w in now.personal.items()
            }
            theta = self.gated_weights(model, now.shared, self.multipliers(model, personal, batch))
            return cross_entropy(model(theta, batch.x), batch)

        return (Phase(train.epochs, (Step(loss, lambda leaf: not leaf.startswith(STATS_PREFIX)),)),)

    def finish(
        self, model: Model, train: LocalTraining, start: Variables, end: Variables, data: Batch
    ) -> Variables:
        M = self.multipliers(model.eval_mode(), end.personal, data)
        return end._replace(personal=end.personal | {_M: M})

    def client_model(self, model: Model, v: Variables) -> Tree:
        return self.gated_weights(model, v.shared, v.personal[_M])

    def gated_weights(self, model: Model, theta: Tree, M: Tensor) -> Tree:
        """theta_i: every run of every tensor times its number of M [L]."""
        return scale_runs(theta, cut_tensors(model, self.blocks), M)

    def multipliers(self, model: Model, personal: Tree, batch: Batch) -> Tensor:
        """M [L], zero where a run is dropped. In training mode the gate's statistics move."""
        M = gate_values(personal, batch.x, batch.real, model.training)
        if self.sparsity == 1:
            return M
        min_gate = min(max(1 / self.blocks, 0.1), self.sparsity)
        p = M.clamp(min=min_gate)
        is_kept = select_runs(cut_tensors(model, self.blocks), p.detach(), self.sparsity - min_gate)
        return M * is_kept * (1 + (p - p.detach()) if self.straight_through else 1)
