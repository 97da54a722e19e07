"""One model for all clients: the mean of what they trained.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, https://arxiv.org/abs/1602.05629, Algorithm 1:

    w  <-  sum_k (n_k / n) w_k

BatchNorm: running statistics are averaged like every other leaf.
Bytes per client and round: all leaves up, all leaves down.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator

from ..algorithm import Algorithm, Phase, Step, Train, Vars
from ..losses import own_loss
from ..models.network import Model
from ..tree import Tree


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """``weights: uniform`` gives every client of the cohort the same weight."""

    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "exclude"

    def init(self, model: Model, rng: Generator) -> Vars:
        return Vars(shared=model.initial, personal={})

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        return (Phase(train.epochs, (Step(own_loss(self, model)),)),)

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return v.shared
