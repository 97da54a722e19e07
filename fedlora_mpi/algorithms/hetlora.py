"""LoRA with a rank per client that prunes itself; factors are weighed by the norms of the products.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA),
EMNLP 2024, https://arxiv.org/abs/2401.06432. Client k has the first r_k components of the server's
A [R, d_in] and B [d_out, R]. Its tail is the components from floor(gamma r_k) on:

    T(A, B)     =  sum over layers of
                   ||B[:, floor(gamma r_k):r_k]||_F ||A[floor(gamma r_k):r_k]||_F
    A_k, B_k   <-  local training on CE + lam T(A_k, B_k)
    r_k        <-  max(r_min, floor(gamma r_k)) for good, if T(A_k, B_k) < T(A, B):
                   the tail is sent no more
    A          <-  sum_k p_k A_k      B  <-  sum_k p_k B_k      p_k = S_k / sum_j S_j
    S_k         =  ||B_k A_k||_F = sqrt(sum (B_k' B_k) o (A_k A_k')), all layers together

Components that a client does not have count as zeros, which dilutes those of the other clients. If
all S_k are zero, clients count equally.

BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes norm. Bytes per
client and round: up 4 (r_k (d_out + d_in) for each decomposed weight, plus the leaves trained in
full, plus S_k); down the same without S_k, where r_k is the client's initial rank. Deviations: once
r_min stops a rank from shrinking, the client has no tail and no penalty. Bytes down and
``lora_truncation`` use the client's initial rank: the server does not know r_k, which is personal.
The head is trained in full and averaged by n_k. gamma, lam and r_min are the values of third-party
code; the paper's values are unknown.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Loss, Phase, Upload, Variables, Visit
from ..components.lora import Adapter, FineTuning, factors
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

_RANK, _NORM = method_leaf_name("lora_rank"), method_leaf_name("norm")


@dataclass(frozen=True)
class HetLoRA(FineTuning):
    """The personal leaf "lora_rank" is r_k. It starts at the largest number of components of any
    layer. Components beyond r_k are zero in both factors, so their gradient is zero.
    """

    gamma: float = 0.99  # [share of a rank] what a pruning leaves; default: third-party code
    lam: float = 0.01  # [1] weight of the penalty T; default: third-party code
    lora_rank_min: int = 1  # [components] r_min, the least rank; default: third-party code

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, gamma="(0, 1]", lam="[0, inf)", lora_rank_min="[1, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        shared = super().init(model, rng).shared
        return Variables(shared, {_RANK: torch.tensor(float(factors.max_components(shared)))})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def keep(start: Variables, now: Variables, data: Batch) -> Variables:
            return self.keep_client_rank(now)

        return Visit(keep), *super().local(model, train, round_), Visit(self.prune)

    def keep_client_rank(self, v: Variables) -> Variables:
        """Return ``v`` with all components after the first r_k set to zero."""
        return v._replace(shared=factors.select_components(v.shared, 0, v.personal[_RANK]))

    def loss(self, model: Model) -> Loss:
        fit = super().loss(model)

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return fit(now, start, batch) + self.lam * self.tail_norm(now)

        return loss

    def tail_norm(self, v: Variables) -> Tensor:
        """T, []: the penalty on the components that the next pruning would remove."""
        r = v.personal[_RANK]
        return factors.product_of_norms(factors.select_components(v.shared, self.pruned_rank(r), r))

    def pruned_rank(self, r: Tensor) -> Tensor:
        """The rank after pruning ``r``; ``r`` itself if gamma or the minimum leave it unchanged."""
        rank = (self.gamma * r.double() + 1e-9).floor().to(r.dtype)  # 0.29 * 100 is below 29
        return rank.clamp(min=self.lora_rank_min).minimum(r)

    def prune(self, start: Variables, end: Variables, data: Batch | None) -> Variables:
        """The client's variables after training; its rank falls if its tail has become smaller."""
        r = start.personal[_RANK]
        r = torch.where(self.tail_norm(end) < self.tail_norm(start), self.pruned_rank(r), r)
        return end._replace(shared=factors.select_components(end.shared, 0, r), personal={_RANK: r})

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        norm = factors.norm_of_products(end.shared)
        mean = super().upload(start, end, round_).mean | {_NORM: norm}
        return Upload(mean, numel=factors.components_numel(mean, int(end.personal[_RANK])))

    def client_model(self, model: Model, v: Variables) -> Tree:
        """The client's own model: its r_k components, or all of them with ``judged: server``."""
        own = v if self.judged == "server" else self.keep_client_rank(v)
        return super().client_model(model, own)

    def adapter(self, model: Model, v: Variables) -> Adapter:
        return super().adapter(model, self.keep_client_rank(v))

    def term_weights(self, upload: Tree, shared: Tree, count: int) -> Tree:
        # the minimum makes clients count equally if all norms are zero
        return dict.fromkeys(factors.factor_pairs(upload), upload[_NORM].clamp(min=1e-8))
