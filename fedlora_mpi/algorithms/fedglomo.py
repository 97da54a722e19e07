"""Momentum that reduces variance, on the server and in the local steps of the clients.

Das et al., "Faster Non-Convex Federated Learning via Global and Local Momentum" (FedGLOMO), UAI
2022, https://arxiv.org/abs/2012.04061. From w_k and from w_{k-1}, client i takes the same local
steps on the same batches B. They end at w_i and what_i:

    v      =   g(w; B) + a (v' - g(w'; B))           w' and v' are those of the step before; first
    w     <-   w - eta v                             v = g(w; B). ``a: 0`` is plain SGD
    D_i    =   w_k - w_i                             Dhat_i = w_{k-1} - what_i
    u_k    =   beta mean D_i + (1 - beta) (u_{k-1} + mean(D_i - Dhat_i))     u_0 = mean D_i
    w_{k+1} =  w_k - u_k

The means are those of ``weights``. If local training is deterministic and all clients take part,
mean Dhat_i is the last round's mean D_i, and u_k = mean D_i for every beta.

BatchNorm: running statistics are those of the steps from w_k, and averaged. Bytes per client and
round: all leaves and all parameters once more (D_i - Dhat_i up, w_{k-1} down). The server keeps u.
Deviations: the abstract and a co-author's code were read, not the paper. The code's last step is
that of a server optimiser; here its lr is 1. Messages are not compressed. The local rule has two
readings: the code has a = 0.8, an earlier version a = 0; theory usually has a = 1. The code has
beta = 1 in its last version, without global momentum, and intends beta = eta^2. A third party
combines gradients of different batches, which is plain SGD. The code reads all gradients from one
network; here each is that of its own point. Momentum is refused, since v is the momentum. Weight
decay is part of g.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator

from ..algorithm import Aggregate, LocalTraining, Phase, Svd, Transport, Update, Upload, Variables
from ..components import local_momentum
from ..components.averaging import Weighting
from ..core.bounds import bounded
from ..core.names import is_method_leaf, method_leaf_name
from ..core.tree import Tree, add_prefix, numel, select_prefix, split
from ..models.network import Model

_U, _PREVIOUS = method_leaf_name("u"), method_leaf_name("previous")


@dataclass(frozen=True)
class FedGLOMO(Weighting):
    """The shared leaves "previous.<parameter>" are w_{k-1}; a client trains them to what_i."""

    # default: the co-author's code
    weights: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)
    # [1] share of the plain mean in u_k, 1: the server is FedAvg's; default: an earlier version of
    # the co-author's code, since 1 of the last one has no global momentum
    beta: float = 0.5
    a: float = 0.8  # [1] local momentum, 0: plain SGD; default: the co-author's code

    def __post_init__(self) -> None:
        bounded(self, beta="(0, 1]", a="[0, 1]")

    def check(self, model: Model, train: LocalTraining) -> None:
        if train.momentum:
            raise ValueError(
                f"name = fedglomo: needs train.momentum = 0, not {train.momentum}: it has its "
                "own, algorithm.a, which is defined for plain SGD"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        parameters, _ = split(model.initial, lambda leaf: model.role(leaf) != "stats")
        return Variables(model.initial | add_prefix(parameters, _PREVIOUS), {})

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, self.receive, download_numel=lambda server, shared, _: numel(shared))

    def receive(self, shared: Tree) -> Tree:
        """Both starts, and with ``a`` what the momentum of both remembers from step to step."""
        previous = select_prefix(shared, _PREVIOUS)
        starts = {"": {n: shared[n] for n in previous}, _PREVIOUS: previous}
        begun = [local_momentum.begin(w, prefix) for prefix, w in starts.items() if self.a]
        return {n: v for tree in (shared, *begun) for n, v in tree.items()}

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        steps = (
            local_momentum.momentum_step(model, self.loss(model), train, self.a, prefix)
            for prefix in ("", _PREVIOUS)
        )
        return (Phase(train.epochs, tuple(steps)),)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        """w_i with its running statistics, and D_i - Dhat_i."""
        D = {n: v - end.shared[n] for n, v in start.shared.items()}
        difference = {_PREVIOUS + n: D[n] - v for n, v in select_prefix(D, _PREVIOUS).items()}
        w = {n: v for n, v in end.shared.items() if not is_method_leaf(n)}
        return Upload(mean=w | difference)

    def server(self, model: Model, shared: Tree) -> Tree:
        zeros = {n: torch.zeros_like(v) for n, v in select_prefix(shared, _PREVIOUS).items()}
        return add_prefix(zeros, _U)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        mean, u, new = aggregate.mean, {}, dict(aggregate.mean)
        beta = self.beta if aggregate.round else 1.0
        for n in select_prefix(shared, _PREVIOUS):
            D = shared[n].double() - mean[n]  # in float64, so that u = D gives the mean to the bit
            u_n = beta * D + (1 - beta) * (server[_U + n].double() + mean[_PREVIOUS + n])
            new[n], new[_PREVIOUS + n] = (shared[n] - u_n).to(mean[n].dtype), shared[n]
            u[_U + n] = u_n.to(mean[n].dtype)
        return Update(new, u)
