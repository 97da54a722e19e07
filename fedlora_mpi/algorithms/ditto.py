"""FedAvg, and beside it a personal model of each client that is pulled towards the shared one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221, Algorithm 1. w is the shared model as received. v_i is the
client's personal model, which is kept between rounds:

    w_i  <-  argmin F_i(w_i) from w                       w  <-  (1/N) sum_i w_i
    v_i  <-  v_i - eta (grad F_i(v_i) + lam (v_i - w))    on the same batches

Predictions are those of v_i.

BatchNorm: v_i has its own running statistics, which are not pulled. Those of w are averaged. Bytes
per client and round: all leaves up, all leaves down. Deviations: none. The mean is uniform, as in
the authors' server (``simple_average``); PFLlib weighs by samples (``weights: samples``). The
default lam is that of the authors' FMNIST script; their code can also choose among 0.1, 1 and 2 by
validation loss. PFLlib trains v_i first, in separate epochs (``plocal_epochs``), and calls lam mu.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Variables
from ..components.averaging import Averaging
from ..components.second_model import OWN, train_beside
from ..core.bounds import bounded
from ..core.tree import Tree, add_prefix, select_prefix, sq_dist
from ..models.network import Model


@dataclass(frozen=True)
class Ditto(Averaging):
    """With ``lam: 0``, v_i trains as in Local. w is that of FedAvg with the same ``weights``, for
    every ``lam``.
    """

    # default: the authors' server
    weights: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)
    lam: float = 1.0  # [1] weight of the pull towards w; default: the authors' FMNIST script

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared=model.initial, personal=add_prefix(model.initial, OWN))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        base_loss = self.loss(model)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]

        def own_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            penalty = sq_dist(self.client_model(model, now), start.shared, parameters)
            return base_loss(now, start, batch) + self.lam / 2 * penalty

        return (Phase(train.epochs, train_beside(model, own_loss)),)

    def client_model(self, model: Model, v: Variables) -> Tree:
        return select_prefix(v.personal, OWN)
