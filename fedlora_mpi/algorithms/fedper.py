"""A shared body and one personal head per client; both train together.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019,
https://arxiv.org/abs/1912.00818, Algorithms 1 and 2. With base layers W_B and personalization
layers W_P_i of client i:

    W_B, W_P_i  <-  argmin L_i(W_B, W_P_i), all epochs
    W_B         <-  sum_i (n_i / n) W_B_i

BatchNorm: affine parameters and running statistics belong to the base layers; statistics are
averaged. Bytes per client and round: all leaves except the ``personal`` ones (the head), up and
down. Deviations: in the paper the last K_P layers are personal (K_P is tuned from 1 to 4), and each
client initialises its own. Here, as in Fling and PFLlib, only the classifier is personal, and all
clients start from the same weights.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Generator

from ..algorithm import LocalTraining, Variables
from ..components.averaging import Averaging
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedPer(Averaging):
    """If all leaves are personal, the method is Local; if none is, it is FedAvg."""

    # the leaves that stay on the client: ``head`` or patterns of leaf names, like ``fc.*``;
    # default: Fling's and PFLlib's (the paper tunes the number of layers)
    personal: tuple[str, ...] = ("head",)

    def check(self, model: Model, train: LocalTraining) -> None:
        for pattern in self.personal:
            if not any(_matches(model, pattern, leaf) for leaf in model.leaves):
                leaves = ", ".join(model.leaves)
                raise ValueError(
                    f"personal = {pattern}: matches no leaf; there are head and {leaves}"
                )

    def init(self, model: Model, rng: Generator) -> Variables:
        def is_personal(leaf: str) -> bool:
            return any(_matches(model, pattern, leaf) for pattern in self.personal)

        personal, shared = split(model.initial, is_personal)
        return Variables(shared=shared, personal=personal)


def _matches(model: Model, pattern: str, leaf: str) -> bool:
    return model.role(leaf) == "head" if pattern == "head" else fnmatchcase(leaf, pattern)
