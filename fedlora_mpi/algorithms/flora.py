"""LoRA whose factors are stacked, merged into the weights, and begun anew in every round.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS
2024, https://arxiv.org/abs/2409.05976. On the weights W + s B_k A_k, p_k = n_k / n:

    A_stack = [p_1 A_1; ...; p_K A_K]      B_stack = [B_1, ..., B_K]      p on one of the two alone     (11)
    W  <-  W + s B_stack A_stack  =  W + s sum_k p_k B_k A_k
    A_k  <-  random      B_k  <-  0

Ranks of clients' own fit as they are; s = alpha / R is the same for all (the authors: alpha_k = 2 r_k).
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in full) up; down
the stack of the last cohort, 4 (sum_k r_k (d_out + d_in) for each, and what is trained in full), none in round 1. One
that missed rounds is counted as if it had followed.
Deviations: the new A is drawn from the seed and the round, the same for all clients; the authors' clients draw
their own. Adam and dropout are theirs, SGD is ours. The head is trained in full and averaged.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..algorithm import Vars
from ..finetuning import FineTuning
from ..lowrank import is_factor, redrawn
from ..models.network import Model
from ..tree import Tree, numel


@dataclass(frozen=True)
class FLoRA(FineTuning):
    """Further shared leaves: "<weight>.W"; "seed" and "round", of the next A; "cohort" and "stack", clients and
    numbers of the last round."""

    sums: ClassVar[bool] = True

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        seed = {"seed": torch.randint(2**24, (), generator=rng).float(), "round": torch.tensor(0.0)}
        return Vars(shared | self.dense(model) | seed, personal)

    def upload(self, start: Vars, end: Vars) -> Tree:
        return {n: v for n, v in super().upload(start, end).items() if n not in ("seed", "round", "cohort", "stack")}

    def received(self, shared: Tree) -> int:
        full = numel({n: v for n, v in self.upload(Vars({}, {}), Vars(self.download(shared), {})).items() if not is_factor(n)})
        return full + int(shared["stack"])

    def term(self, upload: Tree, shared: Tree) -> Tree:
        return {f"{n}.W": p for n, p in self.products(upload).items()}

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        merged = {n: shared[n] + v for n, v in mean.items()}
        round_ = shared["round"] + 1
        A = {n: redrawn(v, shared["seed"], round_, at) for at, (n, v) in enumerate(shared.items()) if n.endswith(".A")}
        B = {n: torch.zeros_like(v) for n, v in shared.items() if n.endswith(".B")}
        return merged | A | B | {"round": round_}
