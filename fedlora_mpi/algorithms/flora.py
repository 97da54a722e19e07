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
from torch import Generator

from ..algorithm import Aggregate, Svd, Term, Update, Upload, Variables
from ..components.lora import FineTuning, dense_updates
from ..core.names import factor_name, factors_by_weight, is_factor, method_leaf_name
from ..core.seeds import uniform
from ..core.tree import Tree, numel
from ..models.network import Model

_DRAW_NUMBER, _STACKED_RANK = method_leaf_name("fresh"), method_leaf_name("last")


@dataclass(frozen=True)
class FLoRA(FineTuning):
    """Two kinds of shared leaves: "<weight>.W"; "fresh" [], the number from which A is drawn, a new
    one every round. The server remembers "last.<weight>" [], the components of the last stack.
    """

    # not a field: an untrained client has B = 0, so its model is the server's
    judged: ClassVar = "server"  # type: ignore[misc]

    def init(self, model: Model, rng: Generator) -> Variables:
        shared = {n: v for n, v in super().init(model, rng).shared.items() if not is_factor(n)}
        # float32 counts 2**23 rounds from it exactly
        number = torch.randint(2**23, (), generator=rng)
        return Variables(shared | self.start_updates(model) | {_DRAW_NUMBER: number.float()}, {})

    def server(self, model: Model, shared: Tree) -> Tree:
        return {_STACKED_RANK + n: torch.tensor(0.0) for n in dense_updates(shared)}

    def receive(self, shared: Tree) -> Tree:
        client_leaves, r = dict(shared), max(self.lora_ranks)
        del client_leaves[_DRAW_NUMBER]
        for number, (name, W) in enumerate(dense_updates(shared).items()):
            rows, in_side = min(r, *W.shape), W.shape[1]
            draw = uniform(shared[_DRAW_NUMBER].long() * 2**16 + number, (rows, in_side))
            client_leaves[factor_name(name, "A")] = (draw * 2 - 1).to(W) / in_side**0.5
            client_leaves[factor_name(name, "B")] = W.new_zeros(len(W), rows)
        return client_leaves

    def received_numel(self, server: Tree, shared: Tree, round_: int) -> int:
        full = {n: v for n, v in self.receive(shared).items() if not is_factor(n, "ABW")}
        W = dense_updates(shared)
        return numel(full) + sum(
            int(server[_STACKED_RANK + n]) * sum(w.shape) for n, w in W.items()
        )

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        """s B_k A_k of each weight; its mean, sum_k p_k s B_k A_k, is the product of the stacks."""
        return {factor_name(n, "W"): p for n, p in self.factor_products(upload).items()}

    def make_term(self, upload: Upload, shared: Tree, weight: int) -> Term:
        # new_full works on the upload's device, so that nothing waits for a copy from the host
        new_scalar = next(iter(upload.mean.values())).new_full
        factors = factors_by_weight(upload.mean, "A")
        ranks = {_STACKED_RANK + n: new_scalar((), len(A)) for n, A in factors.items()}
        return super().make_term(upload, shared, weight)._replace(sum=ranks)

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        return {n: shared[n] + v for n, v in terms.items()}

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        update = super().server_update(server, shared, aggregate, svd)
        next_draw = {_DRAW_NUMBER: shared[_DRAW_NUMBER] + 1}
        return update._replace(shared=update.shared | next_draw, server=aggregate.sum)
