"""LoRA in which one factor trains per round and the other is common, so the mean is exact."""

from dataclasses import dataclass
from typing import Literal

from ...algorithm import LocalTraining, Phase, Step, Upload, Variables, Visit
from ...core.names import is_factor, is_method_leaf
from ...core.tree import Tree, numel
from ...models.network import Model
from . import FineTuning


@dataclass(frozen=True)
class OneFactor(FineTuning):
    """One factor trains in each round; the other is the same for all clients.

    Nothing changes the other factor, not even weight decay. So the mean is exact: sum_k p_k B_k A =
    (sum_k p_k B_k) A. A client of lower rank is padded with zeros, which does not change its
    product B_k A.

    A client sends the round's factor and the leaves trained in full. It receives the factor of the
    previous round. In round 1 it receives no factor, because the initial factors follow from a
    seed, or from the file of an adapter that all clients have.
    """

    @property
    def factor_schedule(self) -> tuple[Literal["A", "B"], ...]:
        """The factors that train in successive rounds; the schedule repeats."""
        return ("B",)

    def active_factor(self, round_: int) -> Literal["A", "B"]:
        """Return the factor that trains in round ``round_`` (from 0)."""
        return self.factor_schedule[round_ % len(self.factor_schedule)]

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        active = self.active_factor(round_)

        def is_trained(leaf):
            return is_factor(leaf, active) or self.is_fully_trained(model, leaf)

        return (Phase(train.epochs, (Step(self.loss(model), is_trained),)),)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        """Return the leaves that train in any round, so that every round has the same layout."""
        letters = "".join(self.factor_schedule)
        mean = {
            n: v for n, v in end.shared.items() if is_factor(n, letters) or not is_method_leaf(n)
        }
        return Upload(mean, numel=self.trained_numel(mean, round_))

    def received_numel(self, server: Tree, shared: Tree, round_: int) -> int:
        return self.trained_numel(self.receive(shared), round_ - 1)

    def trained_numel(self, tree: Tree, round_: int) -> int:
        """Return how many numbers of ``tree`` round ``round_`` trained; -1: before round 1."""

        def is_informative(n):
            return is_factor(n, self.active_factor(round_)) and round_ >= 0 or not is_method_leaf(n)

        return numel({n: v for n, v in tree.items() if is_informative(n)})

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        """Return the mean of the round's factor; the server's other factor is unchanged."""
        return {n: v for n, v in terms.items() if is_factor(n, self.active_factor(round_))}
