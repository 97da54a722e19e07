"""A chain of LoRA blocks: in every round one random factor for all clients, the other trained from zero and merged.

Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
Adaptation", 2024, https://arxiv.org/abs/2410.08305. In round t, on the weights W + s B A:

    right sketch  A_S random, B_k from 0 trained      W  <-  W + s (sum_k p_k B_k) A_S
    left sketch   B_S random, A_k from 0 trained      W  <-  W + s B_S (sum_k p_k A_k)      p_k = n_k / n

One exact gradient step of B is W <- W - eta s^2 grad f(W) A_S' A_S: a projection of the gradient, isotropic over the
rounds, where FFA-LoRA stays in one subspace. ``sketch``: which side is random.

The sketch is Gaussian, of rows (columns) of mean square norm 1, and follows from the seed and the round. Ranks of
clients' own: a client has the first r_k components; padding with zeros is exact.
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: 4 (r_k d_out (left: r_k d_in) for each decomposed weight, and what is trained in full)
up; down the same of the largest rank, which all merge, none in round 1. One that missed rounds is counted as if
it had followed.
Deviations: Algorithm 2 could not be read; clients train as in all other methods. The head is trained in full and
averaged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from ..algorithm import Vars
from ..finetuning import FineTuning
from ..lowrank import is_factor, sketched
from ..models.network import Model
from ..tree import Tree, numel


@dataclass(frozen=True)
class FedRACLoRA(FineTuning):
    """Further shared leaves: "<weight>.W"; "seed" and "round", of the next sketch."""

    sketch: Literal["right", "left"] = "right"

    @property
    def free(self) -> str:
        """The end of the names of the factors that are trained."""
        return ".B" if self.sketch == "right" else ".A"

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        seed = {"seed": torch.randint(2**24, (), generator=rng).float(), "round": torch.tensor(0.0)}
        shared = shared | self.dense(model) | seed
        return Vars(shared | self._drawn(shared, seed["round"]), personal)

    def _drawn(self, shared: Tree, round_: torch.Tensor) -> Tree:
        """The factors at the start of a round."""
        factors = [(at, n, v) for at, (n, v) in enumerate(shared.items()) if is_factor(n)]
        zero = {n: torch.zeros_like(v) for _, n, v in factors if n.endswith(self.free)}
        side = 1 if self.sketch == "right" else 0
        return zero | {n: sketched(v, shared["seed"], round_, at, side) for at, n, v in factors if n not in zero}

    def trains(self, model: Model) -> Callable[[str], bool]:
        return lambda leaf: leaf.endswith(self.free) or self.is_full(model, leaf)

    def upload(self, start: Vars, end: Vars) -> Tree:
        there = super().upload(start, end).items()
        return {n: v for n, v in there if n.endswith(self.free) or not (is_factor(n) or n in ("seed", "round"))}

    def received(self, shared: Tree) -> int:
        largest = {n: v for n, v in shared.items() if not n.startswith("told.")}
        message = self.upload(Vars({}, {}), Vars(largest, {}))
        return numel({n: v for n, v in message.items() if shared["round"] > 0 or not is_factor(n)})

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        step = self.products({n: mean.get(n, v) for n, v in shared.items() if is_factor(n)})
        round_ = shared["round"] + 1
        merged = {f"{n}.W": shared[f"{n}.W"] + p for n, p in step.items()}
        return merged | self._drawn(shared, round_) | {"round": round_}
