"""Steps of the server's own optimiser, which uses the mean change of the clients as its gradient.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
Algorithm 1 (FedOpt). A running statistic has no moments; the server takes its mean.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm import Aggregate, Svd, Update
from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model
from .averaging import Weighting


def init_moments(model: Model, shared: Tree, **initial_values: float) -> Tree:
    """Return ``<moment>.<leaf>`` for every leaf that is stepped, filled with its initial number."""
    leaves = {n: v for n, v in shared.items() if model.role(n) != "stats"}
    return {
        f"{m}.{n}": torch.full_like(v, value)
        for m, value in initial_values.items()
        for n, v in leaves.items()
    }


def step_server(
    server: Tree, shared: Tree, mean: Tree, step: Callable[..., tuple[Tensor, dict[str, Tensor]]]
) -> Update:
    """Return the next variables of the server.

    A leaf x with moments becomes x + increment; any other leaf becomes its mean. ``step(delta,
    **moments)`` returns the increment and the next moments of one leaf, with delta = mean - x. It
    computes in float64, so that the increment delta gives the mean to the bit.
    """
    names = dict.fromkeys(name.partition(".")[0] for name in server)
    server, new_shared = dict(server), dict(mean)
    for leaf, x in shared.items():
        leaf_moments = {m: server[f"{m}.{leaf}"].double() for m in names if f"{m}.{leaf}" in server}
        if not leaf_moments:
            continue
        increment, leaf_moments = step(mean[leaf].double() - x, **leaf_moments)
        new_shared[leaf] = (x + increment).to(x.dtype)
        server |= {f"{m}.{leaf}": value.to(x.dtype) for m, value in leaf_moments.items()}
    return Update(new_shared, server)


@dataclass(frozen=True)
class AdaptiveServer(Weighting):
    """The adaptive server of Algorithm 2, with Delta = sum_k p_k (x_k - x):

        m <- beta1 m + (1 - beta1) Delta        m = 0 before round 1
        v <- second(v, Delta^2)                 v = tau^2
        x <- x + eta m / (sqrt(v) + tau)

    p_k is n_k / n, or equal for all clients (``weights: uniform``), as Algorithm 2 is written.
    """

    # [1] step of the server, to be tuned for each task; default: near the authors' best where their
    # best tau is 0.001
    eta: float = 0.01
    beta1: float = 0.9  # [1] share of m that stays every round; default: the paper's experiments
    # [change of a weight] size below which steps shrink; default: the authors' best in some tasks
    tau: float = 1e-3

    def __post_init__(self) -> None:
        bounded(self, eta="(0, inf)", beta1="[0, 1)", tau="(0, inf)")

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next v from the present one and Delta^2; only this differs between methods."""

    def server(self, model: Model, shared: Tree) -> Tree:
        return init_moments(model, shared, m=0.0, v=self.tau**2)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        def step(delta: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            m = self.beta1 * m + (1 - self.beta1) * delta
            v = self.second_moment(v, delta**2)
            return self.eta * m / (v.sqrt() + self.tau), {"m": m, "v": v}

        return step_server(server, shared, aggregate.mean, step)


@dataclass(frozen=True)
class DecayingServer(AdaptiveServer):
    """An adaptive server whose v forgets old rounds."""

    beta2: float = 0.99  # [1] share of v that stays every round; default: the paper's experiments

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, beta2="[0, 1)")
