"""LoRA factors averaged before they are multiplied (product-sum), or after (sum-product).

Chen et al., "Convergence Analysis of Aggregation-Broadcast in LoRA-enabled Distributed
Fine-Tuning", 2025, https://arxiv.org/abs/2508.01348. On the weights W_0 + s P Q, client i of m
trains P, Q to B_i, A_i. The means are those of ``weights``:

    product_sum    P  <-  mean B_i                 Q  <-  mean A_i
    sum_product    X  <-  mean s B_i A_i = U S V'       P  <-  U_r S_r / s     Q  <-  V_r'

s P Q of sum_product is the best approximation of X of rank r. That of product_sum misses
mean s (B_i - P)(A_i - Q). With ``diagnose`` the log also has what the convergence conditions bound:

    weak_condition      sum_i s ||P Q - B_i A_i||     for the convergence of the local models
    strong_condition_B  sum_i ||P - B_i||             for that of the global model, with the next
    strong_condition_A  sum_i ||Q - A_i||

The norms are over all decomposed weights together. A client tells its distances after the broadcast
has arrived, so the row of a round has those of the round before, of the clients of both rounds
(``condition_clients``; NaN if there is none).

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm. Bytes per client and
round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in full) up and down.
With ``diagnose`` 4 numbers more up, and the client keeps its factors. Deviations: the abstract,
reviews and others' notes could be read, not the proofs. Corollary 1 sums norms, not squares; that
sum is least at a median of the products, not at X. How the paper splits S is unknown; here P has
all of it, and the largest entry of each column of P is positive. The head is trained in full and
averaged. Of different ranks, client k gets the first r_k components, and product_sum pads with
zeros; then the strong condition is NaN, since Corollary 2 needs equal ranks.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator

from ..algorithm import (
    Aggregate,
    LocalTraining,
    Phase,
    Svd,
    Term,
    Update,
    Upload,
    Variables,
    Visit,
)
from ..components.averaging import Weighting
from ..components.lora import FineTuning, conditions, dense_updates
from ..components.lora.redistributed import best_factors
from ..core.names import factor_name, factors_by_weight, is_factor
from ..core.tree import Tree
from ..models.network import Model


@dataclass(frozen=True)
class AggregationBroadcast(Weighting, FineTuning):
    """With product_sum the factors are those of FedIT with the same ``weights``."""

    # default: the paper's means
    weights: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)
    # whether factors are averaged before they are multiplied; default: our choice of the paper's
    # two, the one that meets the strong condition
    operator: Literal["product_sum", "sum_product"] = "product_sum"

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().metrics, *conditions.FIGURES) if self.diagnose else ()

    def init(self, model: Model, rng: Generator) -> Variables:
        v = super().init(model, rng)
        return v._replace(personal=conditions.no_factors(v.shared)) if self.diagnose else v

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        training = super().local(model, train, round_)
        keep = Visit(lambda start, now, data: conditions.keep_factors(now, round_))
        return (*training, keep) if self.diagnose else training

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        upload = super().upload(start, end, round_)
        told = conditions.distances(start, self.factor_products, round_) if self.diagnose else {}
        return upload._replace(sum=told)

    def make_term(self, upload: Upload, shared: Tree, weight: int) -> Term:
        return super().make_term(upload, shared, weight)._replace(sum=upload.sum)

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        if self.operator == "product_sum":
            return super().mean_terms(upload, shared)
        return {factor_name(n, "W"): p for n, p in self.factor_products(upload).items()}

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        if self.operator == "sum_product":
            full = {n: v for n, v in aggregate.mean.items() if not is_factor(n, "W")}
            best = best_factors(dense_updates(aggregate.mean), shared, svd)
            aggregate = aggregate._replace(mean=full | self._divide_scale(best))
        update = super().server_update(server, shared, aggregate, svd)
        equal_ranks = len(self.client_ranks) == 1
        figures = conditions.figures(aggregate.sum, equal_ranks) if self.diagnose else {}
        return update._replace(metrics={**update.metrics, **figures})

    def _divide_scale(self, factors: Tree) -> Tree:
        """The factors of s P Q with s taken from P, and with the signs of the docstring."""
        broadcast = {}
        for n, B in factors_by_weight(factors, "B").items():
            peaks = B.gather(0, B.abs().argmax(0, keepdim=True))  # [1, r]
            signs = torch.where(peaks < 0, -1, 1).to(B)
            broadcast[factor_name(n, "B")] = B * signs / self.s
            broadcast[factor_name(n, "A")] = factors[factor_name(n, "A")] * signs.T
        return broadcast
