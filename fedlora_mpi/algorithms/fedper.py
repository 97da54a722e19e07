"""A shared body under a head of each client's own; both train together.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019,
https://arxiv.org/abs/1912.00818, Algorithms 1 and 2. With base layers W_B and personalization
layers W_P_i of client i:

    W_B, W_P_i  <-  argmin L_i(W_B, W_P_i), all epochs
    W_B         <-  sum_i (n_i / n) W_B_i

BatchNorm: affine parameters and running statistics belong to the base layers; statistics are
averaged. Bytes per client and round: all leaves but the ``personal`` ones (the head), up and down.
Deviations: the paper counts K_P layers from the end (tuned from 1 to 4) and starts each client's at
its own; here, as in Fling and PFLlib, the classifier alone is personal, and all clients start
equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Generator

from ..algorithm import Algorithm, LocalTraining, Variables
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedPer(Algorithm):
    """``personal``: what stays with the client: ``head`` or patterns of leaf names, such as
    ``fc.*``. All of it (``*``) is Local, nothing is FedAvg."""

    personal: tuple[str, ...] = ("head",)
    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "exclude"

    def check(self, model: Model, train: LocalTraining) -> None:
        for pattern in self.personal:
            if not any(map(_leaf_predicate(model, pattern), model.leaves)):
                raise ValueError(
                    f"personal = {pattern}: matches no leaf; there are head and "
                    f"{', '.join(model.leaves)}"
                )

    def init(self, model: Model, rng: Generator) -> Variables:
        predicates = [_leaf_predicate(model, pattern) for pattern in self.personal]
        personal, shared = split(
            model.initial, lambda leaf: any(matches(leaf) for matches in predicates)
        )
        return Variables(shared=shared, personal=personal)


def _leaf_predicate(model: Model, pattern: str) -> Callable[[str], bool]:
    """Whether a leaf is meant by ``pattern``."""
    if pattern == "head":
        return lambda leaf: model.role(leaf) == "head"
    return lambda leaf: fnmatchcase(leaf, pattern)
