"""Clients share a body that aligns class features; each client's head is a mix of all heads.

Xu, Tong and Huang, "Personalized Federated Learning with Feature Alignment and Classifier
Collaboration" (FedPAC), ICLR 2023, https://arxiv.org/abs/2306.11867. Client i has n_i samples, of
which a share pi_k has class k. With the received body it computes over all its samples, where z are
the features:

    h_i = [pi_k mean(z | k)]_k          V_i = (mean ||z||^2 - ||h_i||^2) / n_i

It trains the head for ``head_epochs`` epochs, then the body for all epochs, on the loss CE + lam
mean_d (z - c_y)^2. Here c_k is the mean feature of class k over all clients, or the client's own
mean if no client had the class. Then

    body <- sum_i (n_i / n) body_i      c_k <- sum_i n_ik mean_i(z | k) / sum_i n_ik
    head_i <- sum_j alpha_j head_j,     alpha = argmin over the simplex of alpha' Q alpha,
              Q_ab = delta_ab V_a + <h_i - h_a, h_i - h_b>, that is of
              sum_a V_a alpha_a^2 + ||h_i - sum_a alpha_a h_a||^2

Weights below 0.001 become zero. Round 1 has no feature term. Accuracy is measured after local
training.

BatchNorm: belongs to the body and is averaged. Its statistics move in both phases. The features for
h, V and c are computed in evaluation mode, so they do not depend on the batch. Bytes per client and
round: up the body, the head and classes (2 d + 1) + 1 numbers for c, h and V; down the body, the
head and classes (d + 1) numbers, where d is the number of features. Deviations: no external QP
solver. The authors drop eigenvalues of Q below 0.01 because rounding can make Q indefinite; float64
does not need this. The authors train with lr 0.01, momentum 0.5, weight decay 0.0005; here the body
uses the settings of ``train``. PFLlib weighs all clients equally in c.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, LocalTraining, Mix, Phase, Step, Upload, Variables, Visit
from ..components.prototypes import (
    MEANS,
    OWN_MEANS,
    OWN_VARIANCE,
    aligned_loss,
    check_features,
    class_means,
    class_statistics,
    no_prototypes,
    own_statistics,
)
from ..components.simplex import best_weights
from ..core.bounds import bounded
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedPAC(Algorithm):
    """The ``head_epochs`` come first; all of ``train.epochs`` then train the body."""

    needs_class_labels = True
    evaluate_on = "after_training"
    lam: float = 1.0  # [1] weight of the feature term; default: the authors' code
    head_epochs: int = 1  # [epochs] training of the head; default: the authors' code
    head_lr: float = 0.1  # [1] learning rate of the head; default: the authors' code

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", head_epochs="[0, inf)", head_lr="(0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        check_features("fedpac", model)

    def init(self, model: Model, rng: Generator) -> Variables:
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        classes = no_prototypes(model)
        own = {OWN_MEANS: classes[MEANS], OWN_VARIANCE: torch.zeros(1)}
        return Variables(body | classes, head | own)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        lam = self.lam if round_ else 0.0

        def describe(start: Variables, now: Variables, data: Batch) -> Variables:
            own = own_statistics(model.eval_mode(), self.client_model(model, now), data)
            return now._replace(personal=now.personal | own)

        def show_classes(start: Variables, now: Variables, data: Batch) -> Variables:
            classes = class_statistics(model.eval_mode(), self.client_model(model, now), data)
            return now._replace(shared=now.shared | classes)

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            w = self.client_model(model, now)
            return aligned_loss(model, w, batch, lam, class_means(now, batch))

        head = Step(
            loss, lambda leaf: model.role(leaf) == "head", lambda sgd: sgd._replace(lr=self.head_lr)
        )
        body = Step(loss, lambda leaf: model.role(leaf) in ("body", "norm"))
        return (
            Visit(describe, all_data=True),
            Phase(self.head_epochs, (head,)),
            Phase(train.epochs, (body,)),
            Visit(show_classes, all_data=True),
        )

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        own, head = split(end.personal, {OWN_MEANS, OWN_VARIANCE}.__contains__)
        mix = Mix(head, key=own[OWN_MEANS], extra=own[OWN_VARIANCE], centered=True)
        return Upload(mean=end.shared, mix=mix)

    def mix(self, gram: Tensor, extra: Tensor, round_: int) -> Tensor:
        alpha = best_weights(gram, extra[:, 0])
        alpha = alpha * (alpha > min(1e-3, 0.5 / len(gram)))  # the largest weight is at least 1 / n
        return alpha / alpha.sum(1, keepdim=True)
