"""LoRA whose two factors are trained and averaged in turn, one a round, so that the mean is always exact.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025,
https://arxiv.org/abs/2502.01755. On the weights W_0 + s B A, rounds counted from 1:

    odd rounds   B_k  <-  local training, A held still        B  <-  sum_k p_k B_k
    even rounds  A_k  <-  local training, B held still        A  <-  sum_k p_k A_k        p_k = n_k / n

B comes first: where B = 0, A has no gradient. ``turns: B`` never trains A, which is FFA-LoRA.

Ranks of clients' own: a client has the first r_k components; padding with zeros is exact too.
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: 4 (r_k d_out or r_k d_in for each decomposed weight, and what is trained in full) up; down
the same of the factor that was averaged last, none in round 1. One that missed rounds is counted as if it had
followed.
Deviations: the head is trained in full and averaged in every round. The paper's alpha A B has the factors' names the
other way round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from ..algorithm import Phase, Step, Train, Vars
from ..finetuning import FineTuning
from ..lowrank import is_factor
from ..models.network import Model
from ..tree import Tree, numel


@dataclass(frozen=True)
class RoLoRA(FineTuning):
    """A further shared leaf: "round", rounds done."""

    turns: Literal["both", "B"] = "both"

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        return Vars(shared | {"round": torch.tensor(0.0)}, personal)

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        return (Phase(train.epochs, (Step(self.loss(model), self._moving(model, self.active(round_))),)),)

    def active(self, round_: int) -> str:
        """The letter of the factor that round ``round_``, from 0, trains."""
        return "A" if self.turns == "both" and int(round_) % 2 else "B"

    def _moving(self, model: Model, letter: str) -> Callable[[str], bool]:
        return lambda leaf: leaf.endswith(f".{letter}") or self.is_full(model, leaf)

    def upload(self, start: Vars, end: Vars) -> Tree:
        return {n: v for n, v in super().upload(start, end).items() if n != "round"}

    def sent(self, start: Vars, end: Vars) -> int:
        return _numbers(self.upload(start, end), self.active(start.shared["round"]))

    def received(self, shared: Tree) -> int:
        last = self.active(shared["round"] - 1) if shared["round"] > 0 else ""
        return _numbers(self.download(shared), last) - 1  # without "round"

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        letter = self.active(shared["round"])
        return {n: v for n, v in mean.items() if n.endswith(f".{letter}")} | {"round": shared["round"] + 1}


def _numbers(tree: Tree, letter: str) -> int:
    """How many numbers a message of this factor and of what is trained in full has."""
    return numel({n: v for n, v in tree.items() if not is_factor(n) or (letter and n.endswith(f".{letter}"))})
