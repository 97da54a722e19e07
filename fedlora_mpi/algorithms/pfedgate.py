"""A shared network whose weights a personal gate scales in blocks and prunes to a budget.

Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation" (pFedGate),
ICML 2023, https://arxiv.org/abs/2305.02776. Each parameter tensor of theta is cut into at most
``blocks`` runs of equal length; L is the number of all runs. The gate phi_i sees a batch x of
inputs:

    g(x) = sigmoid(BatchNorm(W SwitchNorm(x))) in (0, 1)^L      M = mean over the batch of g(x)
    theta_i, phi_i <- descend on CE(theta_i * M) from theta, phi_i with gate_lr; * is run by run
    theta <- sum_i (n_i / n) theta_i, without M;  phi_i never leaves client i

With sparsity s < 1 some runs are dropped, that is, count as zero. Let s_min = min(max(1 / blocks,
0.1), s). The first run of every tensor always stays. The other runs are selected greedily,
separately in Linear layers and in all other layers. In order of decreasing round(10 max(M, s_min)),
a run stays if it still fits into round((s - s_min) sum of their sizes). Ties are broken by
position. With ``straight_through`` the runs that stay are also multiplied by 1 + p - sg(p), p =
max(M, s_min), as in the official code; without it the selection is a constant. Accuracy is measured
after local training.

BatchNorm: the network's affine parameters are scaled like all others and its statistics are
averaged; the gate's statistics are the client's own. Bytes per client and round: all leaves of the
model up and down, for every s. Deviations: the client predicts with one M, computed over all its
training samples (client_level_adapt of the official code). Otherwise the official code computes M
for each batch of test samples, so a prediction depends on the other samples of the batch. As one
step trains both, the gate's weight decay has train.lr (there, in an optimizer of its own, gate_lr).
Not implemented: clipping of gradient norms at 10, a separate layer for the multipliers
(seperate_trans), the ReLU on the logits, and the biases of W and of SwitchNorm, which BatchNorm
cancels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables, Visit
from ..components.averaging import Averaging
from ..components.gating import (
    STATS_PREFIX,
    count_runs,
    cut_tensors,
    gate_values,
    init_gate,
    prune_gates,
    scale_gate_gradients,
    scale_runs,
)
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model

_M = STATS_PREFIX + "M"


@dataclass(frozen=True)
class PFedGate(Averaging):
    """The gate, its statistics and M are personal."""

    evaluate_on = "after_training"
    absent: Literal["exclude", "stale"] = "stale"  # default: the official code
    sparsity: float = 1.0  # [share of the weights] weights kept, s; default: our choice, all
    gate_lr: float = 0.1  # [1] learning rate of phi_i; default: our choice, the default train.lr
    blocks: int = 5  # [runs] most runs of a parameter tensor; default: the official code
    # whether runs that stay are multiplied by 1 + p - sg(p); default: the official code
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
        gate = init_gate(model.shape, L, rng) | {_M: torch.full((L,), 0.5)}
        return Variables(model.initial, gate)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            personal = scale_gate_gradients(now.personal, self.gate_lr / train.lr)
            theta = self.gated_weights(model, now.shared, self.multipliers(model, personal, batch))
            return model.loss(model(theta, batch.x), batch)

        def keep_multipliers(start: Variables, now: Variables, data: Batch) -> Variables:
            M = self.multipliers(model.eval_mode(), now.personal, data)
            return now._replace(personal=now.personal | {_M: M})

        step = Step(loss, lambda leaf: not leaf.startswith(STATS_PREFIX))
        return Phase(train.epochs, (step,)), Visit(keep_multipliers, all_data=True)

    def client_model(self, model: Model, v: Variables) -> Tree:
        return self.gated_weights(model, v.shared, v.personal[_M])

    def gated_weights(self, model: Model, theta: Tree, M: Tensor) -> Tree:
        """theta * M: each run of each tensor multiplied by its entry of M [L]."""
        return scale_runs(theta, cut_tensors(model, self.blocks), M)

    def multipliers(self, model: Model, personal: Tree, batch: Batch) -> Tensor:
        """M [L], zero for dropped runs. In training mode the gate's statistics move."""
        M = gate_values(personal, batch.x, batch.real, model.training)
        if self.sparsity == 1:
            return M
        min_gate = min(max(1 / self.blocks, 0.1), self.sparsity)
        cuts = cut_tensors(model, self.blocks)
        return prune_gates(M, cuts, self.sparsity - min_gate, min_gate, self.straight_through)
