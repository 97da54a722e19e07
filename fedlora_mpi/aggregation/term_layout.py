"""Where the channels of a term sit in the one flat buffer."""

from collections.abc import Iterable
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
        return self.size - self._numel(self.sum)

    def pack(self, term: Term, weight: float) -> Tensor:
        """The vector [D] of a client's term; ``weight``: the client's own.

        A leaf with a weight w of its own is multiplied by w / weight, which travels, too: the mean
        of the leaf is the quotient of both means.
        """
        if term.weights:
            ratios = {n: w / weight for n, w in term.weights.items()}
            scaled = {n: term.mean[n] * ratio for n, ratio in ratios.items()}
            term = term._replace(mean=term.mean | scaled, weights=ratios)
        vector = self.flat.pack(_leaves(term))
        return vector if vector.is_floating_point() else vector.float()

    def own_weight(self, vector: Tensor, leaf: str) -> float | None:
        """The weight w / weight that travels in a vector [D] for a leaf of the mean; None if the
        leaf has no weight of its own.
        """
        if leaf not in self.weights:
            return None
        (at,) = self.flat.leaf_slices((_WEIGHT + leaf,))
        return vector[at].item()

    def pack_shared(self, shared: Tree, device: torch.device) -> Tensor:
        """The shared variables in the layout of a term [D], float64; zero for its other leaves."""
        common_leaves = self.flat.common_leaves(shared)

        def leaf_or_zeros(n, shape):
            return shared[n] if n in common_leaves else torch.zeros(shape, device=device)

        return self.flat.pack(
            {n: leaf_or_zeros(n, shape) for n, shape in self.flat.shapes.items()}
        ).double()

    def unpack(self, totals: Tensor, weight: float, shared: Tree, absent: float = 0) -> Term:
        """The mean over clients whose weights add up to ``weight``, from the ``totals`` [D] of
        their vectors, float64.

        shared: the server's variables, which take up rounding, and which count in the mean, but
        not in ``metrics``, with the weight ``absent``. A leaf whose weights are all 0 stays.
        """
        device = totals.device
        mean_size = self.weighted_size - self._numel(_METRIC + n for n in self.metrics)
        parts = totals.split(
            [mean_size, self.weighted_size - mean_size, self.size - self.weighted_size]
        )
        means = parts[0]
        if absent:
            ones = {_WEIGHT + n: torch.ones((), device=device) for n in self.weights}
            means = means + absent * self.pack_shared(shared | ones, device)[:mean_size]
        any_leaf = next(iter(shared.values()), totals)
        vector = torch.cat([means / (weight + absent), parts[1] / weight, parts[2]])
        leaves = self.flat.unpack(vector.to(any_leaf.device))
        weights = {n: leaves[_WEIGHT + n] for n in self.weights}

        def mean(n: str) -> Tensor:
            if n not in weights:
                return absorb_rounding(leaves[n], shared.get(n))
            quotient = leaves[n] / weights[n]
            return torch.where(weights[n] == 0, shared.get(n, leaves[n]), quotient)

        return Term(
            {n: mean(n) for n in self.mean},
            {n: absorb_rounding(leaves[n], shared.get(n)) for n in self.sum},
            weights,
            {n: leaves[_METRIC + n] for n in self.metrics},
        )

    def _numel(self, leaves: Iterable[str]) -> int:
        return sum(self.flat.shapes[n].numel() for n in leaves)


def _leaves(term: Term) -> Tree:
    """All leaves of a term in the order of the buffer."""
    weights = {_WEIGHT + n: v for n, v in term.weights.items()}
    metrics = {_METRIC + n: v for n, v in term.metrics.items()}
    return term.mean | weights | metrics | term.sum
