"""Where the channels of a term sit in the one flat buffer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..algorithm import Term
from ..core.tree import Tree
from .exact_sum import absorb_rounding
from .flat_layout import Layout

# leaves of the buffer that belong to no leaf of the mean or the sum
_WEIGHT, _METRIC = "weight of ", "metric "


@dataclass(frozen=True)
class TermLayout:
    """The leaves of a term in buffer order: the mean, its own weights, metrics, then the sum.

    A client's numbers count with its weight, those of the ``sum`` channel once.
    """

    flat: Layout
    mean: tuple[str, ...]
    weights: tuple[str, ...]
    metrics: tuple[str, ...]
    sum: tuple[str, ...]

    @classmethod
    def of(cls, term: Term) -> "TermLayout":
        """The layout of terms such as ``term``."""
        assert not term.mean.keys() & term.sum.keys(), "mean and sum have a leaf in common"
        assert term.weights.keys() <= term.mean.keys(), "a weight of no leaf of the mean"
        names = map(tuple, (term.mean, term.weights, term.metrics, term.sum))
        return cls(Layout.of(_leaves(term)), *names)

    @property
    def size(self) -> int:
        """D, numbers of a term."""
        return self.flat.size

    @cached_property
    def weighted_size(self) -> int:
        """How many of them count with the weight of their client: all but those of the sum."""
        return self.size - sum(self.flat.shapes[n].numel() for n in self.sum)

    def pack(self, term: Term, weight: float) -> Tensor:
        """The vector [D] of a client's term; ``weight``: the client's own.

        A leaf with a weight w of its own is multiplied by w / weight, which travels, too: the mean
        of the leaf is the quotient of both means.
        """
        if term.weights:
            ratios = {n: w / weight for n, w in term.weights.items()}
            scaled = {n: term.mean[n] * ratio for n, ratio in ratios.items()}
            term = term._replace(mean=term.mean | scaled, weights=ratios)
        return self.flat.pack(_leaves(term))

    def pack_shared(self, shared: Tree, device: torch.device) -> Tensor:
        """The shared variables in the layout of a term [D], float64; zero for its other leaves."""
        common_leaves = self.flat.common_leaves(shared)

        def leaf_or_zeros(n, shape):
            return shared[n] if n in common_leaves else torch.zeros(shape, device=device)

        return self.flat.pack(
            {n: leaf_or_zeros(n, shape) for n, shape in self.flat.shapes.items()}
        ).double()

    def unpack(self, totals: Tensor, weight: float, shared: Tree) -> Term:
        """The mean over clients whose weights add up to ``weight``, from the ``totals`` [D] of
        their vectors, float64; ``shared``: the server's variables, which take up rounding.
        """
        means = torch.cat([totals[: self.weighted_size] / weight, totals[self.weighted_size :]])
        any_leaf = next(iter(shared.values()), totals)
        leaves = self.flat.unpack(means.to(any_leaf.device))
        weights = {n: leaves[_WEIGHT + n] for n in self.weights}
        mean = {
            n: leaves[n] / weights[n] if n in weights else absorb_rounding(leaves[n], shared.get(n))
            for n in self.mean
        }
        return Term(
            mean,
            {n: absorb_rounding(leaves[n], shared.get(n)) for n in self.sum},
            weights,
            {n: leaves[_METRIC + n] for n in self.metrics},
        )


def _leaves(term: Term) -> Tree:
    """All leaves of a term in the order of the buffer."""
    weights = {_WEIGHT + n: v for n, v in term.weights.items()}
    metrics = {_METRIC + n: v for n, v in term.metrics.items()}
    return term.mean | weights | metrics | term.sum
