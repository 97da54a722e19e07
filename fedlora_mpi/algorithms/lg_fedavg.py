"""Clients with networks of their own share the head; body and head train together.

Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global
Representations" (LG-FedAvg), 2020, https://arxiv.org/abs/2001.01523. Client k has a body phi_k, of
any shape, whose features enter a head h of one shape:

    phi_k, h_k  <-  argmin L_k(phi_k, h_k), all epochs, h_k from h
    h           <-  sum_k (n_k / n) h_k

It is the mirror of FedPer. The head's leaves are shared as ``head.weight`` and ``head.bias``,
whatever each network calls them; all clients start at the head of the first network.

BatchNorm: belongs to the body and is the client's own. Bytes per client and round: the head, up and
down. Deviations: the authors share any number of top layers, here it is the head, as in HtFLlib:
what networks of different shapes have in common. Theirs starts from a model that FedAvg has
trained, weighs clients equally (``weights: uniform``), and keeps of each client the model that was
best on its test data. Judged after aggregation, as theirs; the authors of pFedLoRA judge all
methods after training (``accuracy_trained``).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator

from ..algorithm import Algorithm, LocalTraining, Variables
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, split
from ..models.network import Model

_HEAD = method_leaf_name("head")


@dataclass(frozen=True)
class LGFedAvg(Algorithm):
    """FedAvg of the heads."""

    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "exclude"

    def check(self, model: Model, train: LocalTraining) -> None:
        head = split(model.initial, lambda leaf: model.role(leaf) == "head")[0]
        if not model.head or len(select_prefix(head, f"{model.head}.")) < len(head):
            raise ValueError(
                "name = lg_fedavg: needs a network with a body and a head, which is one layer"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        return Variables(
            shared=add_prefix(select_prefix(head, f"{model.head}."), _HEAD), personal=body
        )

    def client_model(self, model: Model, v: Variables) -> Tree:
        return v.personal | add_prefix(select_prefix(v.shared, _HEAD), f"{model.head}.")
