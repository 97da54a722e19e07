"""FedAvg in which a client counts by how far two bounds of its loss are apart (Bound-weight-like).

Xu, Cao, Tsang and Kwok, "Aggregation Weighting of Federated Learning via Generalization Bound
Estimation", 2023, https://arxiv.org/abs/2311.05936, with the bounds of Weber et al., "Certifying
Out-of-Domain Generalization for Blackbox Functions", ICML 2022, https://arxiv.org/abs/2202.01679.
After training, client i measures a loss l in [0, 1] of its training samples. X = l^2 has mean m and
variance v. If the data shift by a Hellinger distance of at most rho, E[X] lies between L and U.
With s = rho^2 and c = sqrt(s (2 - s)) (1 - s):

    U   = m + 2 c sqrt(v) + s (2 - s) (1 - m - v / (1 - m))   if s < 1 - (1 + (1 - m)^2 / v)^(-1/2)
    L   = m - 2 c sqrt(v) - s (2 - s) (m - v / m)             if s <= 1 - (1 + m^2 / v)^(-1/2)
    a_i = U - L,  or 1 / (U - L) with ``direction: inverse``
    w   <- sum_i a_i w_i / sum_i a_i

Otherwise U = 1 and L = 0. l is the Jensen-Shannon divergence of prediction and label in bits, or
the error 0 or 1. If all a_i are zero, clients count equally.

BatchNorm: running statistics are averaged with the same weights; l is measured in evaluation mode.
Bytes per client and round: all leaves and a_i up, all leaves down. Deviations: the method is a
reconstruction. Only the abstract of Xu et al. could be read: bounds of the second moment under a
shift, whose disagreement is a client's proportion. Unknown are what is squared, the distance, rho,
and whether weights grow with the disagreement, as the abstract reads. Weber et al. correct m and v
for the number of samples; this is left out, since for few samples the corrections exceed the
bounds. An inverse weight is at most 10^6 times another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables, Visit
from ..components.own_weights import OwnWeights
from ..components.prototypes import client_class_means
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..models.network import Model

_GAP, _SMALLEST_GAP = method_leaf_name("own", "gap"), 1e-6


@dataclass(frozen=True)
class BoundWeightLike(OwnWeights):
    """The personal leaf "own.gap" is U - L of the client's last round."""

    needs_class_labels = True
    # [Hellinger distance] largest shift of the data; default: our choice, as the paper's is unknown
    rho: float = 0.1
    # l of a sample; default: our choice, as the error of a trained model is often 0 everywhere
    score: Literal["jensen_shannon", "error"] = "jensen_shannon"
    # whether a_i is U - L or its inverse; default: our reading of the abstract
    direction: Literal["proportional", "inverse"] = "proportional"

    def __post_init__(self) -> None:
        bounded(self, rho="[0, 1]")

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(model.initial, {_GAP: torch.zeros(())})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def measure(start: Variables, now: Variables, data: Batch) -> Variables:
            w = self.client_model(model, now)
            m, v = self.moments(lambda x: model.eval_mode()(w, x), data)
            lower, upper = shift_bounds(m, v, self.rho)
            return now._replace(personal={_GAP: (upper - lower).to(now.personal[_GAP])})

        phase = Phase(train.epochs, (Step(self.loss(model), model.leaves.__contains__),))
        return phase, Visit(measure, all_data=True)

    def moments(self, logits: Callable[[Tensor], Tensor], data: Batch) -> tuple[Tensor, Tensor]:
        """m and v over a client's samples, [] float64 each."""

        def powers(x: Tensor) -> Tensor:
            X = self.label_losses(logits(x)).double().square()
            return torch.cat([X, X.square()], 1)

        first, second = client_class_means(powers, data).chunk(2, 1)  # [classes, classes]
        shares = data.counts.double() / data.counts.sum()
        m = shares @ first.diagonal()  # on the diagonal a sample meets its own label
        return m, (shares @ second.diagonal() - m.square()).clamp(min=0)

    def label_losses(self, z: Tensor) -> Tensor:
        """l of the logits z [B, classes] for each label, [B, classes]."""
        if self.score == "error":
            return (z.argmax(1)[:, None] != torch.arange(z.shape[1], device=z.device)).to(z)
        q = z.softmax(1)
        half = (1 + q) / 2
        bits = q * q.clamp(min=torch.finfo(q.dtype).tiny).log2() / 2 - half * half.log2()
        return ((1 - q) / 2 + bits).clamp(0, 1)

    def own_weight(self, v: Variables) -> Tensor:
        gap = v.personal[_GAP]
        inverse = _SMALLEST_GAP / gap.clamp(min=_SMALLEST_GAP)
        return gap if self.direction == "proportional" else inverse


def shift_bounds(m: Tensor, v: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """L and U of a quantity in [0, 1] with mean m and variance v, float64."""
    v, s = v.minimum(m * (1 - m)), rho**2
    c = (s * (2 - s)) ** 0.5 * (1 - s)

    def excess(width: Tensor) -> Tensor:
        """How far the mean can move towards an end of [0, 1] that is at the distance ``width``."""
        ratio = width.square() / v.clamp(min=1e-300)
        move = 2 * c * v.sqrt() + s * (2 - s) * (width - v / width.clamp(min=1e-300))
        return torch.where(s < 1 - (1 + ratio) ** -0.5, move, width)

    return m - excess(m), m + excess(1 - m)
