"""A shared body whose features of a class are pulled together, and heads mixed by what they are worth.

Xu, Tong and Huang, "Personalized Federated Learning with Feature Alignment and Classifier
Collaboration" (FedPAC), ICLR 2023, https://arxiv.org/abs/2306.11867. With the received body, client
i with n_i samples, of which a share pi_k has class k, computes over all of them, z being features:

    h_i = [pi_k mean(z | k)]_k          V_i = (mean ||z||^2 - ||h_i||^2) / n_i

It trains the head, ``head_epochs``, then the body, all epochs, on CE + lam mean_d (z - c_y)^2, where
c_k is the mean feature of class k over all clients, or its own where no client had the class. Then

    body <- sum_i (n_i / n) body_i      c_k <- sum_i n_ik mean_i(z | k) / sum_i n_ik
    head_i <- sum_j alpha_j head_j,     alpha = argmin over the simplex of alpha' Q alpha,
              Q_ab = delta_ab V_a + <h_i - h_a, h_i - h_b>, that is of
              sum_a V_a alpha_a^2 + ||h_i - sum_a alpha_a h_a||^2

Weights below 0.001 become zero. There is no pull in round 1. Accuracy is that after training.
BatchNorm: belongs to the body and is averaged; statistics move in both phases. Features for h, V and
c are those of evaluation mode, so that they depend on no batch.
Bytes per client and round: up body, head, classes (2 d + 1) + 1 numbers for c, h and V; down body,
head, classes (d + 1) numbers, with d features.
Deviations: no external QP solver; the authors drop eigenvalues of Q under 0.01 where rounding made it
indefinite, which float64 does not need. They train with lr 0.01, momentum 0.5, weight decay 0.0005;
here the body takes the settings of ``train``. PFLlib weighs clients equally in c.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, Offer, Phase, Step, Train, Vars
from ..batch import cross_entropy, mean
from ..bounds import bounded
from ..models.network import Model
from ..tree import Tree, split

_CHUNK = 250  # samples whose features are computed together


@dataclass(frozen=True)
class FedPAC(Algorithm):
    """``head_epochs`` come before ``train.epochs``, which all go to the body."""

    evaluates: ClassVar = "after_training"
    centred: ClassVar = True
    surveys: ClassVar = True
    lam: float = 1.0
    head_epochs: int = 1
    head_lr: float = 0.1

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", head_epochs="[0, inf)", head_lr="(0, inf)")

    def check(self, model: Model, train: Train) -> None:
        head = model.leaves.get(f"{model.head}.weight")
        if head is None or head.matrix != "linear":
            raise ValueError("name = fedpac: needs a model with a body and a Linear classifier")

    def init(self, model: Model, rng: Generator) -> Vars:
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        means = torch.zeros(model.leaves[f"{model.head}.weight"].shape)  # [classes, d]
        own = {"own.means": means, "own.variance": torch.zeros(1)}  # h_i and V_i
        return Vars(body | {"class.means": means, "class.shares": means[:, 0]}, head | own)

    def begin(self, model: Model, v: Vars, data: Batch) -> Vars:
        h, energy = statistics(model.evaluating(), self.weights_of(model, v), data)
        variance = ((energy - h.square().sum()).clamp(min=0) / data.counts.sum())[None]
        return v._replace(personal=v.personal | {"own.means": h, "own.variance": variance})

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        lam = self.lam if round_ else 0.0

        def loss(now: Vars, start: Vars, batch: Batch) -> Tensor:
            weights = self.weights_of(model, now)
            z = model.features(weights, batch.x)
            fit = cross_entropy(model.classify(weights, z), batch)
            return fit + lam * pull(z, class_means(now, batch), batch) if lam else fit

        head = Step(
            loss, lambda leaf: model.role(leaf) == "head", sgd=lambda common: common._replace(lr=self.head_lr)
        )
        body = Step(loss, lambda leaf: model.role(leaf) in ("body", "norm"))
        return Phase(self.head_epochs, (head,)), Phase(train.epochs, (body,))

    def finish(self, model: Model, train: Train, start: Vars, end: Vars, data: Batch) -> Vars:
        means, _ = statistics(model.evaluating(), self.weights_of(model, end), data)
        shares = data.counts / data.counts.sum()
        return end._replace(shared=end.shared | {"class.means": means, "class.shares": shares})

    def offer(self, start: Vars, end: Vars) -> Offer:
        own = {"own.means", "own.variance"}
        head = {n: w for n, w in end.personal.items() if n not in own}
        return Offer(head, key=end.personal["own.means"], aux=end.personal["own.variance"])

    def mix(self, gram: Tensor, aux: Tensor, round_: int) -> Tensor:
        alpha = best_weights(gram, aux[:, 0])
        alpha = alpha * (alpha > min(1e-3, 0.5 / len(gram)))  # one is at least 1 / n
        return alpha / alpha.sum(1, keepdim=True)

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return {n: w for n, w in (v.shared | v.personal).items() if model.role(n)}


def pull(z: Tensor, means: Tensor, batch: Batch) -> Tensor:
    """Mean over real examples and features of (z - c_y)^2; z: [B, d], means: [classes, d]."""
    return mean((z - means[batch.y]).square().mean(1), batch)


def class_means(v: Vars, batch: Batch) -> Tensor:
    """c_k [classes, d]: over all clients, or the client's own where none had the class."""
    shares = v.shared["class.shares"][:, None]
    own = v.personal["own.means"] * batch.counts.sum() / batch.counts.clamp(min=1)[:, None]
    return torch.where(shares > 0, v.shared["class.means"] / shares.clamp(min=1e-30), own)


def statistics(model: Model, weights: Tree, data: Batch) -> tuple[Tensor, Tensor]:
    """[pi_k mean(z | k)]_k [classes, d] and mean ||z||^2 over all samples of a client."""
    classes, n = len(data.counts), data.counts.sum()
    real = torch.ones_like(data.y) if data.real is None else data.real
    one_hot = (data.y[:, None] == torch.arange(classes, device=data.y.device)) * real[:, None]  # [n, classes]
    sums, energy = 0.0, 0.0
    for x, which, is_real in zip(data.x.split(_CHUNK), one_hot.split(_CHUNK), real.split(_CHUNK)):
        z = model.features(weights, x)
        sums = sums + which.to(z).T @ z
        energy = energy + (z.square().sum(1) * is_real).sum()
    return sums / n, energy / n


def best_weights(gram: Tensor, variance: Tensor) -> Tensor:
    """Row i: argmin over the simplex of sum_a V_a alpha_a^2 + ||h_i - sum_a alpha_a h_a||^2, [n, n].

    gram: inner products of the h, of which the mean may be taken off. All rows together, by projected
    gradient descent with momentum (FISTA) that starts anew where it overshoots (O'Donoghue and
    Candes, 2015); ends when no row can gain more than 1e-12 of the curvature's scale.
    """
    hessian = gram + torch.diag(variance)
    step = 1 / torch.linalg.matrix_norm(hessian, 2).clamp(min=1e-300)
    slope = lambda alpha: alpha @ hessian - gram  # half the gradient
    alpha = ahead = torch.full_like(gram, 1 / len(gram))
    t = torch.ones(len(gram), 1, dtype=gram.dtype)
    for _ in range(20_000):
        before, alpha = alpha, on_simplex(ahead - step * slope(ahead))
        over = ((ahead - alpha) * (alpha - before)).sum(1, keepdim=True) > 0
        t_next = torch.where(over, 1.0, (1 + (1 + 4 * t.square()).sqrt()) / 2)
        ahead = torch.where(over, alpha, alpha + (t - 1) / t_next * (alpha - before))
        t = t_next
        g = slope(alpha)
        if ((alpha * g).sum(1) - g.amin(1)).max() * step <= 1e-12:
            break
    return alpha


def on_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex to each row (Duchi et al., ICML 2008)."""
    falling = rows.sort(1, descending=True).values
    excess = (falling.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1)
    last = (falling > excess).sum(1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp(min=0)
