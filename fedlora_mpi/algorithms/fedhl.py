"""LoRA with a rank per client, without bias: a full-rank base is corrected by the trained change.

Peng et al., "FedHL: Federated Learning for Heterogeneous Low-Rank Adaptation via Unbiased
Aggregation", 2025, https://arxiv.org/abs/2505.18494. Equation numbers are those with which FedHera,
which has FedHL as a baseline, cites them. W^r is the best rank-r approximation of W (``flexlora``).
Client k trains W^{r_k} to W_k = s_k B_k A_k:

    W    <-  W + sum_k p_k (W_k - W^{r_k})
    t_k  =   ||W - W^{r_k}||_F^2 = sum_{j > r_k} s_j^2, over all layers                         (8)
    p_k  =   1 / (t_k^2 + eps) / sum_j 1 / (t_j^2 + eps)                                        (15)

FlexLoRA's mean differs by sum_k p_k (W - W^{r_k}). Without training FlexLoRA shrinks W, whereas
FedHL leaves W unchanged.

The weights p_k are steep: with the paper's absolute eps = 1e-6, a client whose rank holds all of W
gets nearly the whole weight. ``eps_relative`` adds that share of ||W||_F^4 to eps. ``weight_mode``
chooses p_k: the paper's, uniform, proportional to n_k (samples) or to n_k / (t_k^2 + eps) (both).
``per_layer`` computes t_k and p_k for each layer separately.

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm.

Bytes per client and round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in
full) up and down. The server keeps d_out d_in numbers of each. It computes the weights from
singular values that it already has.

Deviations: what is trained in full is averaged by n_k, since it is not truncated. Only the abstract
could be read: the bound, the choice of per-layer or common weights, and eps follow FedHera's
baseline.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Generator, Tensor

from ..algorithm import Svd, Variables
from ..components.lora import dense_updates
from ..components.lora.redistributed import RedistributedTuning, tail_energies
from ..core.bounds import bounded
from ..core.names import factor_name, factors_by_weight, method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_TAIL = method_leaf_name("tail")


@dataclass(frozen=True)
class FedHL(RedistributedTuning):
    """Further shared leaves: "tail.<weight>" [R + 1], the sum_{j > r} s_j^2 of W for each rank r
    from 0 to R.
    """

    # what p_k follows; default: eq. (15)
    weight_mode: Literal["paper", "uniform", "samples", "both"] = "paper"
    eps: float = 1e-6  # [t_k^2] added to t_k^2; default: FedHera's baseline
    eps_relative: float = 0.0  # [||W||_F^4] added to eps; default: FedHera's baseline
    per_layer: bool = False  # whether each layer has its own p_k; default: FedHera's baseline

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, eps="(0, inf)", eps_relative="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        factors = factors_by_weight(shared, "A")
        tails = {_TAIL + n: torch.zeros(len(A) + 1) for n, A in factors.items()}
        return Variables(shared | tails, personal)

    def receive(self, shared: Tree) -> Tree:
        return super().receive({n: v for n, v in shared.items() if not n.startswith(_TAIL)})

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        """W_k - W^{r_k}, for each decomposed weight."""
        received = self.factor_products(self.receive(shared))
        trained = self.factor_products(upload)
        return {factor_name(n, "W"): p - received[n] for n, p in trained.items()}

    def term_weights(self, upload: Tree, shared: Tree, count: int) -> Tree:
        """p_k, up to a factor common to all clients. It is at most 1, or at most n_k."""
        tails, r = select_prefix(shared, _TAIL), max(self.lora_ranks)
        parts = {
            n: torch.stack([tail[min(r, len(tail) - 1)], tail[-1], tail[0]])
            for n, tail in tails.items()
        }
        if not self.per_layer:
            parts = dict.fromkeys(parts, cast(Tensor, sum(parts.values())))
        n_k = count if self.weight_mode in ("samples", "both") else 1
        return {
            n: n_k * self._rank_weight(*part.double()).to(part.dtype) for n, part in parts.items()
        }

    def _rank_weight(self, tail: Tensor, min_tail: Tensor, total: Tensor) -> Tensor:
        """Eq. (15) for t_k = ``tail``, relative to a client of rank R; 1 if the mode ignores ranks.

        min_tail: t of rank R; total: ||W||_F^2.
        """
        if self.weight_mode not in ("paper", "both"):
            return torch.ones_like(tail)
        eps = self.eps + self.eps_relative * total.square()
        return (min_tail.square() + eps) / (tail.square() + eps)

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        return {n: shared[n] + v for n, v in terms.items()}

    def redistribute(self, shared: Tree, svd: Svd) -> Tree:
        new = super().redistribute(shared, svd)
        B, W = factors_by_weight(new, "B"), dense_updates(new)
        tails = {n: tail_energies(W[n], b) for n, b in B.items()}
        return new | add_prefix(tails, _TAIL)
