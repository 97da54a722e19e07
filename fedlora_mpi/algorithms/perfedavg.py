"""One shared model that performs well after one gradient step on a client's data, not before it.

Fallah et al., "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach" (Per-FedAvg), NeurIPS 2020, https://arxiv.org/abs/2002.07948, eqs. (3), (7)
and Algorithm 1. With D and D' the halves of a mini-batch, beta ``train.lr``:

    F_i(w)  =  f_i(w - alpha grad f_i(w))                                          (3)
    w'      =  w_i - alpha grad f_i(w_i; D)
    w_i    <-  w_i - beta (I - alpha H_i(w_i; D)) grad f_i(w'; D')    hf           (7)
    w_i    <-  w_i - beta grad f_i(w'; D')                            fo
    w      <-  sum_i (n_i / n) w_i

The client's own model is w after one step with lr alpha on one mini-batch of its training data.

BatchNorm: running statistics are averaged. The pass on D does not move them; the pass on D' and the
step before an evaluation do. Bytes per client and round: all leaves up, all leaves down.
Deviations: D and D' share one batch of ``train.batch_size``; a batch of one example is both. The
paper draws D, D' and a third batch for H_i independently, and its code approximates products with
H_i by finite differences. Here these products are exact, and H_i is taken on D. The update with
beta uses the momentum of ``train``. The default alpha is the paper's. The authors of pFedMe use
alpha 0.005 with beta 0.001 and adapt on batches of the test data. PFLlib sets beta to alpha and
trains twice a round.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..algorithm import Batch, LocalTraining, Phase, Sgd, Step, Variables
from ..components.averaging import Averaging
from ..core.batch import split_batch
from ..core.bounds import bounded
from ..core.tree import Tree, split, tmap
from ..models.network import Model
from ..models.second_order import SecondOrder


@dataclass(frozen=True)
class PerFedAvg(Averaging):
    """FedAvg with another loss, and a step before an evaluation."""

    # [1] learning rate of the client's one step; default: the paper's, by others' account
    alpha: float = 0.01
    # fo leaves H_i out (first order), hf has it, at about twice the cost; default: our choice, the
    # cheaper of the paper's two
    variant: Literal["fo", "hf"] = "fo"

    def __post_init__(self) -> None:
        bounded(self, alpha="[0, inf)")

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        base_loss = self.loss(model)
        second_order = SecondOrder() if self.variant == "hf" else nullcontext()

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            D, D_ = split_batch(batch)
            w, stats = split(now.shared, lambda leaf: model.role(leaf) != "stats")

            def f(w: Tree) -> Tensor:
                # BatchNorm normalises by D alone
                with model.training_context(D), second_order:
                    return base_loss(Variables(w | tmap(torch.clone, stats), {}), start, D)

            gradient = torch.func.grad(f)(w if self.variant == "hf" else tmap(torch.detach, w))
            adapted = tmap(lambda v, g: v - self.alpha * g, w, gradient)
            with model.training_context(D_):
                return base_loss(Variables(adapted | stats, {}), start, D_)

        return (Phase(train.epochs, (Step(loss),)),)

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        step = Step(self.loss(model), sgd=lambda sgd: Sgd(self.alpha))
        return (Phase(1, (step,), stream="test", limit=lambda samples: train.batch_size),)
