"""Clients with different networks share their mean outputs per class and learn from the others'.

Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation and
Augmentation under Non-IID Private Data" (FD), 2018, https://arxiv.org/abs/1811.11479. The softmax
of a client's outputs is p(x). z_kc is its mean over the samples of class c. H_c are the clients of
the last round that hold class c:

    w_k     <-  argmin CE(p, y) + gamma CE(zhat_ky, p)          CE(q, p) = - sum_j q_j log p_j
    z_kc    <-  mean of p(x) over the samples of k with y = c, after training
    zhat_kc  =  mean of z_jc over j in H_c other than k         (the round's start)

A class that no other client of the last round holds is not distilled. So nothing is distilled in
round 1. With ``outputs: logits``, z_kc is the mean of the logits, and a client learns from the
softmax of zhat_kc. Aggregation does not change a client's network, so the accuracy is the same
before and after it.

BatchNorm: all of it is personal. The shared outputs are those of evaluation mode. Bytes per client
and round: up, as many numbers as there are classes for each class that the client holds; down, the
same for each class that some client of the last round held. The message that says which classes
these are is not counted. Deviations: the paper averages the outputs during training, while the
model changes; here the mean is that of the trained model over all training data. HtFLlib averages
over all clients, including the client itself, and averages logits, which it uses as probabilities.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from ..algorithm import (
    Aggregate,
    Algorithm,
    Batch,
    LocalTraining,
    Phase,
    Step,
    Svd,
    Transport,
    Update,
    Upload,
    Variables,
    Visit,
)
from ..components.outputs import distill, held_numel, no_outputs, outputs_of_others, show_outputs
from ..components.prototypes import client_class_means
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class FD(Algorithm):
    """For the leaves see ``components/outputs.py``."""

    needs_class_labels = True
    weights = "uniform"
    gamma: float = 1.0  # [1] weight of the distillation; 0: Local; default: HtFLlib's code
    # what is averaged by class; default: our choice, since networks scale their logits differently
    outputs: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        bounded(self, gamma="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        v = no_outputs(model.classes)
        return v._replace(personal=model.initial | v.personal)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        gamma = self.gamma if round_ else 0.0

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            logits = self.logits(model, now, batch.x)
            fit = cross_entropy(logits, batch)
            if not gamma:
                return fit
            teacher = self.teacher_outputs(start, batch.counts, round_)
            return fit + gamma * distill(logits, *teacher, batch)

        def outputs(w: Tree, x: Tensor) -> Tensor:
            logits = model.eval_mode()(w, x)
            return logits.softmax(1) if self.outputs == "probabilities" else logits

        def show(start: Variables, now: Variables, data: Batch) -> Variables:
            w = self.client_model(model, now)
            z = client_class_means(lambda x: outputs(w, x), data)
            v = show_outputs(z, (data.counts > 0).to(z), round_)
            return v._replace(personal=now.personal | v.personal)

        phase = Phase(train.epochs, (Step(loss, model.leaves.__contains__),))
        return phase, Visit(show, all_data=True)

    def teacher_outputs(self, v: Variables, counts: Tensor, round_: int) -> tuple[Tensor, Tensor]:
        """zhat [classes, classes], one row per class, and the number of other clients that hold
        each class [classes].
        """
        zhat, holders = outputs_of_others(v, (counts > 0).to(counts), round_)
        return (zhat if self.outputs == "probabilities" else zhat.softmax(1)), holders

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(sum=end.shared, numel=held_numel({}, end.shared, round_))

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, download_numel=held_numel)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        return Update(aggregate.sum, server)
