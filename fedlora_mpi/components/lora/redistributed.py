"""LoRA in which each client receives the best approximation of a dense update of the server."""

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from ...algorithm import Aggregate, Svd, Update, Variables
from ...core.names import factor_name, is_factor
from ...core.tree import Tree
from ...models.network import Model
from ..lowrank import right_singular_vectors
from . import FineTuning, dense_updates


@dataclass(frozen=True)
class RedistributedTuning(FineTuning):
    """The server keeps a dense update W per decomposed weight and sends each client a truncation.

    Client k receives W^r, the best approximation of W of the client's rank r. With W = U S V' the
    factors are B = U_r S_r / s_k and A = V_r', so all singular values are in B.

    Shared leaves: "<weight>.W", and the factors A = V_R' and B = W V_R without a scale. If W has a
    rank below R, the remaining rows of A are orthonormal to the others and the corresponding
    columns of B are zero; so no component is dead. Before round 1 W = 0 has no singular directions,
    and A is random; if the network has an adapter, W is its product.
    """

    # s_k is alpha / r_k (rank), alpha / sqrt(r_k) (root) or alpha / R (common); default: FlexLoRA's
    # s_k as FedHera's code has it
    scale: Literal["rank", "root", "common"] = "rank"  # type: ignore[assignment]  # has "rank" too

    def scale_of(self, lora_rank: int) -> float:
        return self.s if self.scale == "common" else self.alpha / self._scale_divisor(lora_rank)

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        updates = self.start_updates(model)
        adapted = {n: updates[factor_name(n, "W")] for n in model.adapter.factors}
        return Variables(shared | updates | best_factors(adapted, shared, _decompose), personal)

    def receive(self, shared: Tree) -> Tree:
        client_leaves = super().receive({n: v for n, v in shared.items() if not is_factor(n, "W")})
        return {n: v / self.s if is_factor(n, "B") else v for n, v in client_leaves.items()}

    def update_parts(self, shared: Tree) -> tuple[Tree, Tree]:
        """Return W alone on the server, and the factors alone on a client."""
        W = dense_updates(shared)
        return ({}, W) if W else (shared, {})

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        return self.products_as_updates(upload)

    def products_as_updates(self, tree: Tree) -> Tree:
        """Return {"<weight>.W": s B A} of all factors in ``tree``."""
        return {factor_name(n, "W"): p for n, p in self.factor_products(tree).items()}

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        update = super().server_update(server, shared, aggregate, svd)
        return update._replace(shared=self.redistribute(update.shared, svd))

    def redistribute(self, shared: Tree, svd: Svd) -> Tree:
        """Return ``shared`` with the factors of its W."""
        return shared | best_factors(dense_updates(shared), shared, svd)


def best_factors(W: Tree, shared: Tree, svd: Svd) -> Tree:
    """Return A = V_R' and B = W V_R of dense matrices {weight: W}, without a scale.

    B A is the best approximation of W that has the rank R of the weight's factors in ``shared``.
    """
    V = svd({n: (w, len(shared[factor_name(n, "A")])) for n, w in W.items()})
    A = {factor_name(n, "A"): v for n, v in V.items()}
    return A | {factor_name(n, "B"): W[n] @ v.T for n, v in V.items()}


def _decompose(matrices: dict[str, tuple[Tensor, int]]) -> Tree:
    """Return the result of ``Svd``, computed here."""
    return {n: right_singular_vectors(W, rows) for n, (W, rows) in matrices.items()}
