"""LoRA in which a dense update on all clients corrects the error of averaged factors."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ...algorithm import Variables
from ...core.names import factor_name, is_factor, method_leaf_name
from ...core.tree import Tree, numel
from ...models.network import Model
from . import FineTuning, dense_updates

_CLIENTS = method_leaf_name("last", "clients")


@dataclass(frozen=True)
class CalibratedTuning(FineTuning):
    """The server averages the factors, and every client adds the residual R to its dense update W:

        W  <-  W + R      R = sum_k p_k s B_k A_k - s B A = sum_k p_k s (B_k - B) (A_k - A)

    R is what the product of the means misses, so that W + s B A moves by the mean of the trained
    updates. The last form has k terms of rank r. Their left factors p_k (B_k - B) sum to zero, so R
    of k clients has rank at most (k - 1) r.

    ``downlink``: R travels as a matrix (dense), or as k - 1 pairs of factors (factored). The choice
    only changes how many received numbers a round counts.

    Shared leaves: "<weight>.W", "last.clients" [].
    """

    downlink: Literal["dense", "factored"] = "dense"

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        W = {
            factor_name(n, "W"): torch.zeros(*size)
            for n, size in self.adapted_shapes(model).items()
        }
        return Variables(shared | W | {_CLIENTS: torch.tensor(0.0)}, personal)

    def download_numel(self, shared: Tree) -> Tensor | int:
        return numel(
            {n: v for n, v in self.download(shared).items() if not is_factor(n, "W")}
        ) + self.residual_numel(shared)

    def residual_numel(self, shared: Tree) -> Tensor | int:
        """Return how many numbers the R of the last round takes; 0 before round 1."""
        clients = shared[_CLIENTS].long()
        total: Tensor | int = 0
        for name, W in dense_updates(shared).items():
            factored_numel = (
                (clients - 1).clamp(min=0) * len(shared[factor_name(name, "A")]) * sum(W.shape)
            )
            total += (clients > 0) * W.numel() if self.downlink == "dense" else factored_numel
        return total

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        return super().mean_terms(upload, shared) | {
            factor_name(n, "W"): p for n, p in self.factor_products(upload).items()
        }

    def cohort_counts(self, upload: Tree) -> dict[str, int]:
        return {"clients": 1}

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        mean_products = self.factor_products(mean)
        return mean | {
            factor_name(n, "W"): W + mean[factor_name(n, "W")] - mean_products[n]
            for n, W in dense_updates(shared).items()
        }
