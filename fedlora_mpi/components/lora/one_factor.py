"""In a round one factor trains and the other is the same for all, so the mean is exact."""

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
    """In a round one factor trains. The other is the same for all clients; not even weight decay
    moves it. So the mean is exact, sum_k p_k B_k A = (sum_k p_k B_k) A, and zeros in place of
    components that a client lacks change nothing.

    A client sends the round's factor and the leaves trained in full. It receives the factor of the
    round before; in round 1 none, for the first factors follow from a seed. A further shared leaf:
    "turn.round", rounds done.
    """

    @property
    def factor_schedule(self) -> tuple[Literal["A", "B"], ...]:
        """The factors that train, round after round; after the last the first again."""
        return ("B",)

    def active_factor(self, round_: int) -> Literal["A", "B"]:
        """The factor that trains in round ``round_`` (from 0)."""
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
        """The leaves that train in any round: its layout is the same in all."""

        def is_excluded(n):
            return n.startswith(_TURN_PREFIX) or is_factor(n) and n[-1] not in self.factor_schedule

        return {n: v for n, v in super().upload(start, end).items() if not is_excluded(n)}

    def upload_numel(self, start: Variables, end: Variables) -> int:
        return self.trained_numel(self.upload(start, end), int(start.shared[ROUND]))

    def download_numel(self, shared: Tree) -> int:
        return self.trained_numel(self.download(shared), int(shared[ROUND]) - 1)

    def trained_numel(self, tree: Tree, round_: int) -> int:
        """How many numbers of ``tree`` carry what round ``round_`` trained; -1: before round 1."""

        def is_informative(n):
            return is_factor(n, self.active_factor(round_)) and round_ >= 0 or not is_method_leaf(n)

        return numel({n: v for n, v in tree.items() if is_informative(n)})

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        """The mean of the round's factor; the server keeps the other as it is."""
        active = self.active_factor(int(shared[ROUND]))
        return {n: v for n, v in mean.items() if is_factor(n, active)} | {ROUND: shared[ROUND] + 1}
