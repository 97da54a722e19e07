"""One factor that trains in a round beside one that is the same for all, so that the mean is exact."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from ..algorithm import Phase, Step, Train, Vars
from ..lowrank import is_factor
from ..models.network import Model
from ..tree import Tree, numel
from . import FineTuning


@dataclass(frozen=True)
class OneFactor(FineTuning):
    """In a round one factor trains; the other is the same for all clients, and no weight decay moves it. So the mean
    is exact, sum_k p_k B_k A = (sum_k p_k B_k) A, and zeros in place of components that a client lacks change nothing.

    Sent are the round's factor and what is trained in full; received the factor of the round before, none in round 1,
    since the first ones follow from a seed. A further shared leaf: "turn.round", rounds done.
    """

    @property
    def turns(self) -> tuple[Literal["A", "B"], ...]:
        """Which factor trains, round after round, and then from the first again."""
        return ("B",)

    def active(self, round_: int) -> str:
        """How the names of the factors end that train in round ``round_`` (from 0)."""
        return f".{self.turns[round_ % len(self.turns)]}"

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        return Vars(shared | {"turn.round": torch.tensor(0.0)}, personal)

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        active = self.active(round_)
        trains = lambda leaf: leaf.endswith(active) or self.is_full(model, leaf)
        return (Phase(train.epochs, (Step(self.loss(model), trains),)),)

    def upload(self, start: Vars, end: Vars) -> Tree:
        """The leaves that train in any round: its layout is the same in all."""
        stays = lambda n: n.startswith("turn.") or is_factor(n) and n[-1] not in self.turns
        return {n: v for n, v in super().upload(start, end).items() if not stays(n)}

    def sent(self, start: Vars, end: Vars) -> int:
        return self.numbers(self.upload(start, end), int(start.shared["turn.round"]))

    def received(self, shared: Tree) -> int:
        return self.numbers(self.download(shared), int(shared["turn.round"]) - 1)

    def numbers(self, tree: Tree, round_: int) -> int:
        """How many numbers of ``tree`` tell what round ``round_`` has trained; -1: before round 1."""
        own = lambda n: n.endswith((".A", ".B", ".W")) or n.startswith(("turn.", "told."))
        told = lambda n: n.endswith(self.active(round_)) and round_ >= 0 or not own(n)
        return numel({n: v for n, v in tree.items() if told(n)})

    def aggregate(self, shared: Tree, mean: Tree) -> Tree:
        """The mean of the round's factor; of the other the server has the bits."""
        active = self.active(int(shared["turn.round"]))
        return {n: v for n, v in mean.items() if n.endswith(active)} | {"turn.round": shared["turn.round"] + 1}
