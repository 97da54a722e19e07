"""FedAvg whose clients also distil from their own previous model, which averaging has overwritten.

Jin et al., "Personalized Edge Intelligence via Federated Self-Knowledge Distillation" (pFedSD),
IEEE TPDS 2023, https://ieeexplore.ieee.org/document/9964434. Client i starts at the mean w. Its
teacher is its previous model v_i, as it was at the end of the last round in which the client
participated. o(.) are logits, T is the temperature:

    L_i(w)  =  CE(o(w), y) + lam T^2 KL(softmax(o(v_i) / T) || softmax(o(w) / T))
    w_i     <-  argmin L_i(w_i) from w        v_i <- w_i        w <- (1/N) sum_i w_i

In its first round a client has no teacher, and the second term is zero. The method's accuracy is
that of w_i, before averaging.

BatchNorm: running statistics are averaged. The teacher normalises by the batch, as in the authors'
code and in Fling, and does not move its statistics. ``teacher_bn: running`` uses the running
statistics of v_i (and no dropout). Bytes per client and round: all leaves up and down; v_i stays on
the client. Deviations: lam and T default to Fling's values; the authors' code has 1 and 1. The
authors' code averages only parameters, so the statistics of w always stay at their initial values.
It keeps v_i on the server, which sends it along. A client outside the cohort is evaluated with w.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables, Visit
from ..components.averaging import Averaging
from ..core.batch import cross_entropy, kl_divergence, mean
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import add_prefix, select_prefix
from ..models.network import Model

_OWN, _HAS_TEACHER = method_leaf_name("own"), method_leaf_name("taught")


@dataclass(frozen=True)
class PFedSD(Averaging):
    """The personal leaves "own.<leaf>" are v_i; "taught" is 0 before there is one."""

    needs_class_labels = True
    evaluate_on = "after_training"
    # [1] weight of the distillation; 0: FedAvg; default: Fling's (the authors' code: 1)
    lam: float = 0.5
    temperature: float = 3.0  # [1] T of the distillation; default: Fling's (the authors' code: 1)
    # what the teacher normalises by, the batch or running statistics; default: the authors' code
    teacher_bn: Literal["batch", "running"] = "batch"
    weights: Literal["samples", "uniform"] = "uniform"  # default: the authors' code

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", temperature="(0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(
            shared=model.initial,
            personal=add_prefix(model.initial, _OWN) | {_HAS_TEACHER: torch.tensor(0.0)},
        )

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        teacher = model if self.teacher_bn == "batch" else model.eval_mode()

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            o = model(now.shared, batch.x)  # before the teacher, so the noise is FedAvg's
            v = select_prefix(start.personal, _OWN)
            gap = self.distillation_loss(teacher(model.detach_tree(v), batch.x), o, batch)
            return cross_entropy(o, batch) + start.personal[_HAS_TEACHER] * self.lam * gap

        def become_teacher(start: Variables, now: Variables, data: Batch) -> Variables:
            has_teacher = torch.ones_like(start.personal[_HAS_TEACHER])
            return Variables(now.shared, add_prefix(now.shared, _OWN) | {_HAS_TEACHER: has_teacher})

        step = Step(loss, lambda leaf: model.role(leaf) is not None)
        return Phase(train.epochs, (step,)), Visit(become_teacher)

    def distillation_loss(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        """The mean of T^2 KL(teacher || student) over the real examples, []. Logits: [B,
        classes].
        """
        return mean(kl_divergence(teacher, student, self.temperature), batch)
