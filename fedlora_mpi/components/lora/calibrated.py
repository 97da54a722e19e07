"""LoRA in which a dense update on all clients corrects the error of averaged factors."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from ...algorithm import Aggregate, Svd, Update, Variables
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

    Shared leaves: "<weight>.W". The server remembers "last.clients" [], how many took part.
    """

    # how R counts in ``bytes_down``: as a matrix (dense), or as k - 1 pairs of factors (factored);
    # default: FedEx-LoRA's authors' code
    downlink: Literal["dense", "factored"] = "dense"

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        return Variables(shared | self.zero_updates(model), personal)

    def server(self, model: Model, shared: Tree) -> Tree:
        return {_CLIENTS: torch.tensor(0.0)}

    def received_numel(self, server: Tree, shared: Tree, round_: int) -> int:
        without_W = {n: v for n, v in self.receive(shared).items() if not is_factor(n, "W")}
        return numel(without_W) + self.residual_numel(server, shared)

    def residual_numel(self, server: Tree, shared: Tree) -> int:
        """Return how many numbers the R of the last round takes; 0 before round 1."""
        clients, W = int(server[_CLIENTS]), dense_updates(shared)
        if not clients:
            return 0
        if self.downlink == "dense":
            return numel(W)
        return sum(
            (clients - 1) * len(shared[factor_name(name, "A")]) * sum(w.shape)
            for name, w in W.items()
        )

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        return super().mean_terms(upload, shared) | {
            factor_name(n, "W"): p for n, p in self.factor_products(upload).items()
        }

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        update = super().server_update(server, shared, aggregate, svd)
        return update._replace(server={_CLIENTS: torch.tensor(float(aggregate.clients))})

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        mean_products = self.factor_products(terms)
        return terms | {
            factor_name(n, "W"): W + terms[factor_name(n, "W")] - mean_products[n]
            for n, W in dense_updates(shared).items()
        }
