"""LoRA with one rank per client: factors are stacked and merged into the weights every round.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, https://arxiv.org/abs/2409.05976. On the weights W_0 + W, W = 0 at the
start:

    A_k  ~   U(-1, 1) / sqrt(d_in)      B_k  <-  0
    A_k, B_k  <-  local training on W_0 + W + s B_k A_k
    A  =  [p_1 A_1; ...; p_K A_K]       B  =  [B_1, ..., B_K]       p_k = n_k / n
    W  <-  W + s B A  =  W + sum_k p_k s B_k A_k

Only one of the stacks has p_k; p_k on both would weigh a client by p_k^2. The stack has rank sum_k
r_k, so nothing is lost or diluted. s is the same for all ranks.

BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes norm. Bytes per
client and round: up 4 r_k (d_out + d_in) for each decomposed weight; down the stack of the last
round, 4 sum_j r_j (d_out + d_in) over its clients j; in both directions also the leaves trained in
full. All sides draw A_k from a common number, so A_k is not sent down. A_k is trained, so it must
be sent up with B_k. Deviations: each of the authors' clients draws its own A_k; here A_k are the
first r_k rows of one draw per round. A client that was absent would need the stacks of all rounds
that it missed; only the last stack is counted.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..algorithm import Cohort, Variables
from ..components.lora import FineTuning, dense_updates
from ..core.names import factor_name, factors_by_weight, is_factor, method_leaf_name
from ..core.seeds import uniform
from ..core.tree import Tree, numel
from ..models.network import Model

_DRAW_NUMBER, _STACKED_RANK = method_leaf_name("fresh"), method_leaf_name("last")


@dataclass(frozen=True)
class FLoRA(FineTuning):
    """Three kinds of shared leaves: "<weight>.W"; "fresh" [], the number from which A is drawn, a
    new one every round; "last.<weight>" [], the number of components of the last stack.
    """

    # not a field: an untrained client has B = 0, so its model is the server's
    judged: ClassVar = "server"  # type: ignore[misc]

    def init(self, model: Model, rng: Generator) -> Variables:
        shared = {n: v for n, v in super().init(model, rng).shared.items() if not is_factor(n)}
        for name, size in self.adapted_shapes(model).items():
            shared |= {
                factor_name(name, "W"): torch.zeros(*size),
                _STACKED_RANK + name: torch.tensor(0.0),
            }
        number = torch.randint(
            2**23, (), generator=rng
        )  # float32 counts 2**23 rounds from it exactly
        return Variables(shared | {_DRAW_NUMBER: number.float()}, {})

    def download(self, shared: Tree) -> Tree:
        client_leaves, r = (
            {n: v for n, v in super().download(shared).items() if n != _DRAW_NUMBER},
            max(self.lora_ranks),
        )
        for number, (name, W) in enumerate(dense_updates(shared).items()):
            rows, in_side = min(r, *W.shape), W.shape[1]
            draw = uniform(shared[_DRAW_NUMBER].long() * 2**16 + number, (rows, in_side))
            client_leaves[factor_name(name, "A")] = (draw * 2 - 1).to(W) / in_side**0.5
            client_leaves[factor_name(name, "B")] = W.new_zeros(len(W), rows)
        return client_leaves

    def download_numel(self, shared: Tree) -> Tensor | int:
        full = {n: v for n, v in self.download(shared).items() if not is_factor(n, "ABW")}
        return sum(
            shared[_STACKED_RANK + n].long() * sum(W.shape)
            for n, W in dense_updates(shared).items()
        ) + numel(full)

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        """s B_k A_k of each weight; its mean, sum_k p_k s B_k A_k, is the product of the stacks."""
        return {factor_name(n, "W"): p for n, p in self.factor_products(upload).items()}

    def cohort_counts(self, upload: Tree) -> dict[str, int]:
        return {n: len(A) for n, A in factors_by_weight(upload, "A").items()}

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        return {n: shared[n] + v for n, v in mean.items()}

    def server_update(
        self, server: Tree, shared: Tree, mean: Tree, cohort: Cohort
    ) -> tuple[Tree, Tree]:
        server, new = super().server_update(server, shared, mean, cohort)
        return server, new | {_DRAW_NUMBER: shared[_DRAW_NUMBER] + 1}
