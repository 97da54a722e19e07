"""Clients with different networks share the head; body and head train together.

Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global
Representations" (LG-FedAvg), 2020, https://arxiv.org/abs/2001.01523. Client k has a body phi_k of
any architecture. The features of phi_k are the input of a head h, which has the same shape on all
clients:

    phi_k, h_k  <-  argmin L_k(phi_k, h_k), all epochs, h_k from h
    h           <-  sum_k (n_k / n) h_k

This is the mirror image of FedPer. The leaves of the head are shared as ``head.weight`` and
``head.bias``, whatever each network calls them. All clients start with the head of the first
network.

BatchNorm: belongs to the body and is the client's own. Bytes per client and round: the head, up and
down. Deviations: the authors share any number of top layers. Here, as in HtFLlib, only the head is
shared, because it is all that networks of different shapes have in common. The authors' code starts
from a model trained by FedAvg, weighs clients equally (``weights: uniform``), and keeps each
client's model that was best on its test data. Accuracy is measured after aggregation, as in the
authors' code; the authors of pFedLoRA measure all methods after training (``accuracy_trained``).
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import LocalTraining, Variables
from ..components.averaging import Averaging
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, split
from ..models.network import Model

_HEAD = method_leaf_name("head")


@dataclass(frozen=True)
class LGFedAvg(Averaging):
    """FedAvg on the heads alone."""

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
