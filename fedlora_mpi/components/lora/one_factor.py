"""One factor that trains in a round beside one that is the same for all, so that the mean is exact."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from ...algorithm import Phase, Step, Train, Vars
from ...core.names import is_factor, is_own, own_name
from ...core.tree import Tree, numel
from ...models.network import Model
from . import FineTuning

_TURN = own_name("turn")
ROUND, SEED = _TURN + "round", _TURN + "seed"


@dataclass(frozen=True)
class OneFactor(FineTuning):
    """In a round one factor trains; the other is the same for all clients, and no weight decay
    moves it. So the mean is exact, sum_k p_k B_k A = (sum_k p_k B_k) A, and zeros in place of
    components that a client lacks change nothing.

    Sent are the round's factor and what is trained in full; received the factor of the round
    before, none in round 1, since the first ones follow from a seed. A further shared leaf:
    "turn.round", rounds done.
    """

    @property
    def turns(self) -> tuple[Literal["A", "B"], ...]:
        """Which factor trains, round after round, and then from the first again."""
        return ("B",)

    def active(self, round_: int) -> Literal["A", "B"]:
        """The factor that trains in round ``round_`` (from 0)."""
        return self.turns[round_ % len(self.turns)]

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        return Vars(shared | {ROUND: torch.tensor(0.0)}, personal)

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        active = self.active(round_)

        def trains(leaf):
            return is_factor(leaf, active) or self.is_full(model, leaf)

        return (Phase(train.epochs, (Step(self.loss(model), trains),)),)

    def upload(self, start: Vars, end: Vars) -> Tree:
        """The leaves that train in any round: its layout is the same in all."""

        def stays(n):
            return n.startswith(_TURN) or is_factor(n) and n[-1] not in self.turns

        return {n: v for n, v in super().upload(start, end).items() if not stays(n)}

    def sent(self, start: Vars, end: Vars) -> int:
        return self.numbers(self.upload(start, end), int(start.shared[ROUND]))

    def received(self, shared: Tree) -> int:
        return self.numbers(self.download(shared), int(shared[ROUND]) - 1)

    def numbers(self, tree: Tree, round_: int) -> int:
        """How many numbers of ``tree`` tell what round ``round_`` has trained; -1: before round 1."""

        def told(n):
            return is_factor(n, self.active(round_)) and round_ >= 0 or not is_own(n)

        return numel({n: v for n, v in tree.items() if told(n)})

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        """The mean of the round's factor; of the other the server has the bits."""
        active = self.active(int(shared[ROUND]))
        return {n: v for n, v in mean.items() if is_factor(n, active)} | {ROUND: shared[ROUND] + 1}
