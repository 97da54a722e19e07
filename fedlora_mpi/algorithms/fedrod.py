"""A generic model trained as if all classes were equally frequent, plus a personal head per client.

Chen and Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification"
(Fed-RoD, linear variant), ICLR 2022, https://arxiv.org/abs/2107.00778. With body theta, generic
head psi, personal head phi_i, n_i[c] samples of class c, sg stopping the gradient:

    z = f(x; theta)        g = psi(z)        p = sg g + phi_i(sg z)
    theta, psi  <-  argmin CE(g + gamma log n_i, y)      balanced softmax: the generic predictor
    phi_i       <-  argmin CE(p, y)                      the client's own model
    theta, psi  <-  sum_i (n_i / n) theta_i, psi_i

BatchNorm: affine parameters and running statistics belong to theta; statistics are averaged. Bytes
per client and round: all leaves of the model (psi included) up and down. Deviations: the authors
published no code, and re-implementations differ in which loss trains theta. By default only the
first loss does (as in PFLlib and fluke). ``personal_trains_body`` removes the sg before z, as in
Fling. FL-bench stops no gradient and predicts with phi_i(z) alone. The counts n_i cover all of a
client's training data; PFLlib does not count the last batch. The hypernetwork that generates phi_i
is not implemented.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables
from ..components.averaging import Averaging
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_OWN = method_leaf_name("own")


@dataclass(frozen=True)
class FedRoD(Averaging):
    """The personal leaves "own.<leaf>" are phi_i."""

    needs_class_labels = True
    # [1] weight of log n_i in the generic loss; 0: FedAvg; default: the balanced softmax
    gamma: float = 1.0
    # phi_i before round 1: a copy of psi, so p is 2 g at first, or zero, so p = g; default:
    # PFLlib's and fluke's (the authors published no code)
    head: Literal["copy", "zero"] = "copy"
    # whether the loss of phi_i trains theta too; default: PFLlib's and fluke's (Fling: true)
    personal_trains_body: bool = False

    def __post_init__(self) -> None:
        bounded(self, gamma="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if not model.ends_in_linear:
            raise ValueError(
                "name = fedrod: needs a network that ends in a Linear; "
                f"{model.head or 'the last layer'} is none, or not alone and last"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        start = 1.0 if self.head == "copy" else 0.0
        phi = {n: v * start for n, v in model.initial.items() if model.role(n) == "head"}
        return Variables(shared=model.initial, personal=add_prefix(phi, _OWN))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            z = model.features(now.shared, batch.x)
            g = model.classify(now.shared, z)
            p = g.detach() + model.classify(
                select_prefix(now.personal, _OWN), z if self.personal_trains_body else z.detach()
            )
            # -inf for a class that the client does not have
            prior = torch.xlogy(self.gamma, batch.counts)
            return cross_entropy(g + prior, batch) + cross_entropy(p, batch)

        return (Phase(train.epochs, (Step(loss),)),)

    def client_model(self, model: Model, v: Variables) -> Tree:
        """The client's own model. Both heads are linear, so their sum is one head: psi(z) +
        phi_i(z) = (psi + phi_i)(z).
        """
        return v.shared | {n: v.shared[n] + w for n, w in select_prefix(v.personal, _OWN).items()}
