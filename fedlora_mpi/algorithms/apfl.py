"""Each client predicts with a learned mixture of the shared model and its own model.

Deng et al., "Adaptive Personalized Federated Learning", 2020, https://arxiv.org/abs/2003.13461,
Algorithm 1 and eq. (10). Client i keeps its own v_i and alpha_i. In every local step

    vbar_i   =  alpha_i v_i + (1 - alpha_i) w_i
    w_i     <-  w_i - eta grad f_i(w_i)            v_i  <-  v_i - eta alpha_i grad f_i(vbar_i)

    alpha_i <-  clip(alpha_i - eta <v_i - w_i, grad f_i(vbar_i)>, 0, 1)     once, before them  (10)
    w       <-  sum_i (n_i / n) w_i

The factors alpha_i and v_i - w_i come from the chain rule: both v_i and alpha_i descend on
f_i(vbar_i).

BatchNorm: vbar_i has its own running statistics. Those of w are averaged.

Bytes per client and round: all leaves up, all leaves down.

Deviations: the step on alpha_i draws its own mini-batch instead of the round's first one, and does
not update the running statistics. Parameters are interpolated, as in the paper; the authors' code
(FedTorch) and FL-bench interpolate logits. FedTorch updates alpha_i after the first step, with a
decay of 0.02 (``alpha_decay``). PFLlib trains v_i on a separate loss, overwrites it by vbar_i and
starts from alpha_i = 1.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Sgd, Step, Variables
from ..components.averaging import Averaging
from ..components.second_model import OWN, train_beside
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix
from ..models.network import Model

_MIX_ALPHA = method_leaf_name("mix", "alpha")


@dataclass(frozen=True)
class APFL(Averaging):
    """The personal leaf "mix.alpha" is alpha_i, "own.<leaf>" are v_i."""

    # [1] alpha_i of every client before round 1; default: the authors' code (FedTorch)
    alpha: float = 0.5
    # whether alpha_i is learned or stays fixed; default: the paper's Algorithm 1
    adaptive: bool = True
    # [1] weight decay of the step on alpha_i; default: eq. (10), which has none (FedTorch: 0.02)
    alpha_decay: float = 0.0

    def __post_init__(self) -> None:
        bounded(self, alpha="[0, 1]", alpha_decay="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        v = add_prefix(model.initial, OWN)
        return Variables(shared=model.initial, personal=v | {_MIX_ALPHA: torch.tensor(self.alpha)})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        def mixture_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            vbar = model.copy_statistics(self.client_model(model, now))
            return model.loss(model(vbar, batch.x), batch)

        def plain_sgd(sgd):
            return Sgd(sgd.lr, weight_decay=self.alpha_decay)

        alpha_step = Step(mixture_loss, _MIX_ALPHA.__eq__, plain_sgd, clamp=(0.0, 1.0))
        training = Phase(train.epochs, train_beside(model, self.loss(model)))
        if not self.adaptive:
            return (training,)
        mixing = Phase(1, (alpha_step,), stream="alpha", limit=lambda samples: train.batch_size)
        return mixing, training

    def client_model(self, model: Model, v: Variables) -> Tree:
        """vbar_i, with its own running statistics."""
        alpha = v.personal[_MIX_ALPHA]
        vbar = {}
        for n in model.leaves:
            own_weight = v.personal[OWN + n]
            vbar[n] = (
                own_weight
                if model.role(n) == "stats"
                else alpha * own_weight + (1 - alpha) * v.shared[n]
            )
        return vbar
