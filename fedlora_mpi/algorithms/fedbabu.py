"""FedAvg of a body that trains under a frozen random head; each client tunes the head for itself.

Oh, Kim, Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR
2022, https://arxiv.org/abs/2106.06042, Algorithm 1. For client i with body w and the head h_0 that
all clients draw before round 1:

    w_i <- argmin_w L_i(w, h_0)
    w   <- sum_i (n_i / n) w_i
    h_i <- argmin_h L_i(w, h), from h_0, on a copy before an evaluation

BatchNorm: statistics belong to the body and are averaged.
Bytes per client and round: the body up, the body down.
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import LocalTraining, Phase, Step, Variables
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedBABU(Averaging):
    """The head is personal: h_0, which is tuned on copies alone."""

    # [epochs] training of the head before an evaluation; default: our choice, as train.epochs
    ft_epochs: int = 5

    def __post_init__(self) -> None:
        bounded(self, ft_epochs="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        return Variables(shared=body, personal=head)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        step = Step(self.loss(model), lambda leaf: model.role(leaf) != "head")
        return (Phase(train.epochs, (step,)),)

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        step = Step(self.loss(model), lambda leaf: model.role(leaf) == "head")
        return (Phase(self.ft_epochs, (step,)),)
