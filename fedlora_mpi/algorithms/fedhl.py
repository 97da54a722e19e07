"""LoRA with a rank per client, without bias: a full-rank base is corrected by the trained change.

Peng et al., "FedHL: Federated Learning for Heterogeneous Low-Rank Adaptation via Unbiased
Aggregation", 2025, https://arxiv.org/abs/2505.18494. W^r is the best rank-r approximation of W
(``flexlora``). Client k trains W^{r_k} to W_k = s_k B_k A_k:

    W    <-  W + sum_k p_k (W_k - W^{r_k})        FlexLoRA's mean lacks sum_k p_k (W - W^{r_k})
    t_k  =   ||W - W^{r_k}||_F^2 = sum_{j > r_k} s_j^2, over all layers (``per_layer``: of each)
    p_k  ~   n_k / (t_k / ||W||_F^2 + tau)        ``weight_mode: drift``
    p_k  ~   n_k (samples), 1 (uniform), 1 / (t_k + eps) (inverse), 1 / (t_k^2 + eps) (fedhera)

Without training W stays. The source of drift: client k has its gradient at W^{r_k}, which differs
from that at W by e_k, |e_k|^2 <= L^2 t_k. With q_k = n_k / n, the descent lemma has p in

    L^2 sum_k p_k^2 t_k / q_k           truncation: a bound of |sum_k p_k e_k|^2
    s sum_k p_k^2 / q_k                 noise of the gradients, of variance s / q_k each
    zeta^2 sum_k (p_k - q_k)^2 / q_k    another objective than q's, by gradients that differ by zeta

The sum is least at p_k ~ q_k / (t_k + (zeta^2 + s) / L^2). So tau is no guard against a division by
zero: it is the noise and the heterogeneity in units of t. With the bound N sum_k p_k^2 |e_k|^2 and
noise s, p_k ~ q_k / (zeta^2 + q_k (N L^2 t_k + s)), which for equal n_k is of the same form.

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm. Bytes per client and
round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in full) up and down.
The server, which has all singular values, keeps d_out d_in numbers of each. Deviations: what is
trained in full is averaged by n_k, since it is not truncated. Only the abstract could be read. The
baseline of FedHera reads eq. (15) as 1 / (t_k^2 + 1e-6) and doubts whether a norm or its square is
meant; with fedhera, one client gets nearly the whole weight. ``fedhera_samples`` is n_k times that.
"""

from dataclasses import dataclass
from warnings import warn

from torch import Generator

from ..algorithm import LocalTraining, Svd, Variables
from ..components.lora import dense_updates
from ..components.lora.rank_weights import (
    UNBOUNDED,
    WITHOUT_SAMPLES,
    WeightMode,
    rank_weight,
    tail_energies,
    tails_of_rank,
)
from ..components.lora.redistributed import RedistributedTuning
from ..core.bounds import bounded
from ..core.names import factor_name, factors_by_weight, method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_TAIL = method_leaf_name("tail")
_HAZARD = "a client whose rank holds all of W gets nearly the whole weight; drift bounds it"


@dataclass(frozen=True)
class FedHL(RedistributedTuning):
    """Further shared leaves: "tail.<weight>" [R + 1], the sum_{j > r} s_j^2 of W for each rank r
    from 0 to R. ``eps_relative`` adds that share of ||W||_F^2 (fedhera: ^4) to eps.
    """

    weight_mode: WeightMode = "drift"  # what p_k follows; default: our choice, as derived above
    tau: float = 0.3  # [||W||_F^2] noise and heterogeneity as t_k; default: our choice, bounds p_k
    eps: float = 1e-6  # [t_k, fedhera: t_k^2] added to it; default: FedHera's baseline
    eps_relative: float = 0.0  # [||W||_F^2, fedhera: ^4] added to eps; default: FedHera's baseline
    per_layer: bool = False  # whether each layer has its own p_k; default: FedHera's baseline

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, tau="(0, inf)", eps="(0, inf)", eps_relative="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        super().check(model, train)
        if self.weight_mode in UNBOUNDED and not self.eps_relative:
            warn(f"weight_mode = {self.weight_mode}: {_HAZARD}", stacklevel=2)

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        return Variables(_with_tails(shared), personal)

    def receive(self, shared: Tree) -> Tree:
        return super().receive({n: v for n, v in shared.items() if not n.startswith(_TAIL)})

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        """W_k - W^{r_k}, for each decomposed weight."""
        received = self.factor_products(self.receive(shared))
        trained = self.factor_products(upload)
        return {factor_name(n, "W"): p - received[n] for n, p in trained.items()}

    def term_weights(self, upload: Tree, shared: Tree, count: int) -> Tree:
        """p_k, up to a factor common to all clients. It is at most 1, or at most n_k."""
        parts = tails_of_rank(select_prefix(shared, _TAIL), max(self.lora_ranks), self.per_layer)
        n_k = 1 if self.weight_mode in WITHOUT_SAMPLES else count
        settings = (self.tau, self.eps, self.eps_relative)
        return {n: n_k * rank_weight(self.weight_mode, p, *settings) for n, p in parts.items()}

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        return {n: shared[n] + v for n, v in terms.items()}

    def redistribute(self, shared: Tree, svd: Svd) -> Tree:
        return _with_tails(super().redistribute(shared, svd))


def _with_tails(shared: Tree) -> Tree:
    B, W = factors_by_weight(shared, "B"), dense_updates(shared)
    return shared | add_prefix({n: tail_energies(W[n], b) for n, b in B.items()}, _TAIL)
