"""FedAvg whose clients correct their gradients by control variates, to reduce client drift.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
https://arxiv.org/abs/1910.06378, eqs. (3)-(5) with option II of Algorithm 1. K is the number of
local steps of client i, eta_l ``train.lr``, eta_g ``server_lr``, S the cohort, N all clients:

    y_i   <-  y_i - eta_l (grad f_i(y_i) - c_i + c)                K times, from y_i = x     (3)
    c_i+   =  c_i - c + (x - y_i) / (K eta_l)                                           (4), II
    x     <-  x + eta_g mean_S(y_i - x)        c  <-  c + (|S| / N) mean_S(c_i+ - c_i)       (5)

The correction is implemented as the loss term <c - c_i, y_i - x>, whose gradient is c - c_i. Means
are uniform.

BatchNorm: affine parameters are corrected; running statistics are averaged (for every eta_g). Bytes
per client and round: all leaves plus all parameters once more (c_i+ - c_i up, c down); c_i stays on
the client. Deviations: none. Momentum is refused, because with momentum (4) is no longer a mean of
gradients. Weight decay is part of f_i. K counts the last, smaller batch of each epoch; PFLlib drops
that batch.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import (
    Aggregate,
    Algorithm,
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
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, split, tmap
from ..models.network import Model

_C = method_leaf_name("c")
_C_I = method_leaf_name("c_i")


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """The leaves "c.<parameter>" are c, "c_i.<parameter>" are c_i; both start at zero."""

    weights = "uniform"
    server_lr: float = 1.0  # [1] eta_g, 1: x is the mean; default: our choice, as in FedAvg

    def __post_init__(self) -> None:
        bounded(self, server_lr="(0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if train.momentum:
            raise ValueError(
                f"name = scaffold: needs train.momentum = 0, not {train.momentum}: its control "
                "variates are means of gradients only under plain SGD; a higher train.lr makes "
                "up for it"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        parameters, _ = split(model.initial, lambda leaf: model.role(leaf) != "stats")
        zeros = tmap(torch.zeros_like, parameters)
        return Variables(model.initial | add_prefix(zeros, _C), add_prefix(zeros, _C_I))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        base_loss = self.loss(model)

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            x, y = start.shared, now.shared
            drift = sum(
                ((x[_C + n] - start.personal[_C_I + n]) * (y[n] - x[n])).sum()
                for n in _parameters(x)
            )
            return base_loss(now, start, batch) + drift  # eq. (3)

        def update_control(start: Variables, now: Variables, data: Batch) -> Variables:
            K = train.epochs * (data.counts.sum() / train.batch_size).ceil()
            x, y = start.shared, now.shared
            c_i = {
                _C_I + n: start.personal[_C_I + n] - x[_C + n] + (x[n] - y[n]) / (K * train.lr)
                for n in _parameters(x)
            }  # eq. (4)
            return Variables(y, c_i)

        step = Step(loss, lambda leaf: model.role(leaf) is not None)
        return Phase(train.epochs, (step,)), Visit(update_control)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        """y_i with its running statistics, and c_i+ - c_i."""
        parameters = _parameters(start.shared)
        c = {_C + n: end.personal[_C_I + n] - start.personal[_C_I + n] for n in parameters}
        return Upload(mean=end.shared | c)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        mean, parameters = aggregate.mean, _parameters(shared)
        # lerp returns exactly the mean at server_lr 1
        x = {n: torch.lerp(shared[n], mean[n], self.server_lr) for n in parameters}
        c = {_C + n: shared[_C + n] + aggregate.share * mean[_C + n] for n in parameters}
        return Update(mean | x | c)  # eq. (5)


def _parameters(shared: Tree) -> list[str]:
    """The leaves that have a control variate: all except running statistics."""
    return list(select_prefix(shared, _C))
