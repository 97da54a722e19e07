"""Factors that are averaged one by one, with what their mean misses in a dense update that all
clients hold.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ...algorithm import Vars
from ...core.names import factor, is_factor, own_name
from ...core.tree import Tree, numel
from ...models.network import Model
from . import FineTuning, dense

_CLIENTS = own_name("last", "clients")


@dataclass(frozen=True)
class Calibrated(FineTuning):
    """Factors are averaged, and what their mean product has beside is added to the frozen weights
    of everybody:

        W  <-  W + R      R = sum_k p_k s B_k A_k - s B A = sum_k p_k s (B_k - B) (A_k - A)

    so that W + s B A moves by the mean of what was trained. The last form has k terms of rank r
    whose left factors are p_k (B_k - B), together zero: R of k clients has at most rank (k - 1) r.

    ``downlink``: R travels as a matrix (dense), or as k - 1 pairs of factors (factored). It changes
    what a round counts as received, no variable.

    Shared leaves: "<weight>.W", "last.clients" [].
    """

    downlink: Literal["dense", "factored"] = "dense"

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        W = {factor(n, "W"): torch.zeros(*size) for n, size in self.adapted(model).items()}
        return Vars(shared | W | {_CLIENTS: torch.tensor(0.0)}, personal)

    def received(self, shared: Tree) -> Tensor | int:
        return numel(
            {n: v for n, v in self.download(shared).items() if not is_factor(n, "W")}
        ) + self.residual(shared)

    def residual(self, shared: Tree) -> Tensor | int:
        """How many numbers the R of the last round comes to; none before round 1."""
        clients, total = shared[_CLIENTS].long(), 0
        for name, W in dense(shared).items():
            factored = (clients - 1).clamp(min=0) * len(shared[factor(name, "A")]) * sum(W.shape)
            total += (clients > 0) * W.numel() if self.downlink == "dense" else factored
        return total

    def term(self, upload: Tree, shared: Tree) -> Tree:
        return super().term(upload, shared) | {
            factor(n, "W"): p for n, p in self.products(upload).items()
        }

    def counted(self, upload: Tree) -> dict[str, int]:
        return {"clients": 1}

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        of_means = self.products(mean)
        return mean | {
            factor(n, "W"): W + mean[factor(n, "W")] - of_means[n] for n, W in dense(shared).items()
        }
