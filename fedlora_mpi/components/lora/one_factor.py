"""LoRA in which one factor trains per round and the other is common, so the mean is exact."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from ...algorithm import LocalTraining, Phase, Step, Variables
from ...core.names import is_factor, is_method_leaf, method_leaf_name
from ...core.tree import Tree, numel
from ...models.network import Model
from . import FineTuning

_TURN_PREFIX = method_leaf_name("turn")
ROUND, SEED = _TURN_PREFIX + "round", _TURN_PREFIX + "seed"


@dataclass(frozen=True)
class OneFactor(FineTuning):
    """One factor trains in each round; the other is the same for all clients.

    Nothing changes the other factor, not even weight decay. So the mean is exact: sum_k p_k B_k A =
    (sum_k p_k B_k) A. A client of lower rank is padded with zeros, which does not change its
    product B_k A.

    A client sends the round's factor and the leaves trained in full. It receives the factor of the
    previous round. In round 1 it receives no factor, because the initial factors follow from a
    seed. One further shared leaf, "turn.round", counts the finished rounds.
    """

    @property
    def factor_schedule(self) -> tuple[Literal["A", "B"], ...]:
        """The factors that train in successive rounds; the schedule repeats."""
        return ("B",)

    def active_factor(self, round_: int) -> Literal["A", "B"]:
        """Return the factor that trains in round ``round_`` (from 0)."""
        return self.factor_schedule[round_ % len(self.factor_schedule)]

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        return Variables(shared | {ROUND: torch.tensor(0.0)}, personal)

    def phases(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        active = self.active_factor(round_)

        def is_trained(leaf):
            return is_factor(leaf, active) or self.is_fully_trained(model, leaf)

        return (Phase(train.epochs, (Step(self.loss(model), is_trained),)),)

    def upload(self, start: Variables, end: Variables) -> Tree:
        """Return the leaves that train in any round, so that every round has the same layout."""

        def is_excluded(n):
            return n.startswith(_TURN_PREFIX) or is_factor(n) and n[-1] not in self.factor_schedule

        return {n: v for n, v in super().upload(start, end).items() if not is_excluded(n)}

    def upload_numel(self, start: Variables, end: Variables) -> int:
        return self.trained_numel(self.upload(start, end), int(start.shared[ROUND]))

    def download_numel(self, shared: Tree) -> int:
        return self.trained_numel(self.download(shared), int(shared[ROUND]) - 1)

    def trained_numel(self, tree: Tree, round_: int) -> int:
        """Return how many numbers of ``tree`` round ``round_`` trained; -1: before round 1."""

        def is_informative(n):
            return is_factor(n, self.active_factor(round_)) and round_ >= 0 or not is_method_leaf(n)

        return numel({n: v for n, v in tree.items() if is_informative(n)})

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        """Return the mean of the round's factor; the server's other factor is unchanged."""
        active = self.active_factor(int(shared[ROUND]))
        return {n: v for n, v in mean.items() if is_factor(n, active)} | {ROUND: shared[ROUND] + 1}
