"""A shared body and one personal head per client; the head trains first, then the body.

Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
https://arxiv.org/abs/2102.07078, Algorithm 1. With body phi and head h_i of client i:

    h_i    <-  argmin L_i(phi, h_i), head_epochs epochs, phi held still
    phi_i  <-  argmin L_i(phi_i, h_i), the other epochs, h_i held still
    phi    <-  sum_i (n_i / n) phi_i

BatchNorm: affine parameters and running statistics belong to phi. The statistics are averaged, and
they also move while the head trains. Bytes per client and round: all leaves except those of the
head, up and down. Deviations: the paper's mean has equal weights; the authors' code weighs by
samples, as here. The authors' code uses one optimizer for both parts, so with torch before version
2 the momentum still moves the part that is held still. Here each part starts with empty momenta.
The authors' code trains the heads for 10 epochs in the last round. PFLlib uses no momentum and
keeps the statistics on the client.
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import LocalTraining, Phase, Step, Variables
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedRep(Averaging):
    """The head is personal, the body shared."""

    # [epochs] training of the head, before the other ``train.epochs`` train the body; default: our
    # choice, mostly the head as in the authors' scripts (10 and 1)
    head_epochs: int = 4

    def __post_init__(self) -> None:
        bounded(self, head_epochs="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if self.head_epochs > train.epochs:
            raise ValueError(
                f"head_epochs = {self.head_epochs}: must be at most train.epochs = {train.epochs}, "
                "of which it is a part"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        return Variables(shared=body, personal=head)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        head = Step(self.loss(model), lambda leaf: model.role(leaf) == "head")
        body = Step(self.loss(model), lambda leaf: model.role(leaf) != "head")
        return Phase(self.head_epochs, (head,)), Phase(train.epochs - self.head_epochs, (body,))
