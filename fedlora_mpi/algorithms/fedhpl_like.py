"""Clients tune prompts and a head, and learn from each other's mean logits per class (FedHPL-like).

Ma et al., "FedHPL: Efficient Heterogeneous Federated Learning with Prompt Tuning and Logit
Distillation", 2024, https://arxiv.org/abs/2405.17267, with the prompts of Jia et al., "Visual
Prompt Tuning", ECCV 2022, https://arxiv.org/abs/2203.12119. Each client has a frozen vision
Transformer, prompts at its input and a head of its own. z are its logits. After training, client i
classifies m_i[c] of its samples of class c correctly; L_i[c] is the mean of their z. Clients j are
those of the last round:

    loss    =  CE(z, y) + gamma T^2 KL(softmax(G_i[y] / T) || softmax(z / T))
    G_i[c]  =  sum_{j != i} m_j[c] L_j[c] / sum_{j != i} m_j[c]
               L_i[c] of client i's own last round, if no other client has the class

A class that neither has is not distilled, so nothing is in round 1. The server sends the sums over
all j of m_j L_j and m_j, from which client i takes its own part off.

BatchNorm: uses the stored statistics unchanged. Bytes per client and round: 4 (C C + C) up and
down, for C classes. Deviations: the method is a reconstruction. Only the abstract of FedHPL could
be read: frozen pre-trained networks, a few visual prompts, logits alone are shared, and a weighted
aggregation makes global logits for each client. Unknown are the weights and which samples count
(here m_j), the loss and T, the depth and number of prompts (here at the input alone), the head, and
what stands in for a class that others lack. Accuracies are the same before and after aggregation,
which changes no network.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import (
    Aggregate,
    Batch,
    LocalTraining,
    Phase,
    Step,
    Svd,
    Update,
    Upload,
    Variables,
    Visit,
)
from ..components.outputs import (
    correct_outputs,
    mean_of_held,
    no_outputs,
    outputs_of_others,
    own_outputs,
    show_outputs,
)
from ..components.prompts import PromptTuning
from ..core.batch import cross_entropy, kl_divergence
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

_CORRECT = method_leaf_name("own", "correct")


@dataclass(frozen=True)
class FedHPLLike(PromptTuning):
    """The personal leaf "own.correct" is m_i; for the others see ``components/outputs.py``."""

    needs_class_labels = True
    weights = "uniform"
    gamma: float = 1.0  # [1] weight of the distillation; 0: each client alone; default: our choice
    temperature: float = 2.0  # [1] T of the distillation; default: our choice

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, gamma="[0, inf)", temperature="(0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        v = no_outputs(model.classes)
        tuned = self.tuned_leaves(model, rng)
        return v._replace(personal=tuned | v.personal | {_CORRECT: torch.zeros(model.classes)})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            z = self.logits(model, now, batch.x)
            fit = cross_entropy(z, batch)
            if not (self.gamma and round_):
                return fit
            G, holders = self.teacher_logits(start, round_)
            gaps = kl_divergence(G[batch.y], z, self.temperature)
            return fit + self.gamma * mean_of_held(gaps, holders, batch)

        def show(start: Variables, now: Variables, data: Batch) -> Variables:
            sums, m = correct_outputs(lambda x: self.logits(model.eval_mode(), now, x), data)
            v = show_outputs(sums, m, round_)
            return v._replace(personal=now.personal | v.personal | {_CORRECT: m})

        step = Step(loss, self.trained_leaves(model))
        return Phase(train.epochs, (step,)), Visit(show, all_data=True)

    def teacher_logits(self, v: Variables, round_: int) -> tuple[Tensor, Tensor]:
        """G_i [classes, classes], one row per class, and how many samples are behind a row."""
        m = v.personal[_CORRECT]
        G, others = outputs_of_others(v, m, round_)
        own = own_outputs(v, m)
        return torch.where(others[:, None] > 0, G, own), torch.where(others > 0, others, m)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(sum=end.shared)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        return Update(aggregate.sum, server)
