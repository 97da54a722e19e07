"""FedAvg, and beside it a personal model of each client that is pulled towards the shared one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221, Algorithm 1. w is the shared model as received. v_i is the
client's personal model, which is kept between rounds:

    w_i  <-  argmin F_i(w_i) from w                       w  <-  sum_i (n_i / n) w_i
    v_i  <-  v_i - eta (grad F_i(v_i) + lam (v_i - w))    on the same batches

Predictions are those of v_i.

BatchNorm: v_i has its own running statistics, which are not pulled. Those of w are averaged. Bytes
per client and round: all leaves up, all leaves down. Deviations: none. The default lam is that of
the authors' FMNIST script; their code can also choose among 0.1, 1 and 2 by validation loss. PFLlib
trains v_i first, in separate epochs (``plocal_epochs``), and calls lam mu.
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, sq_dist
from ..models.network import Model

_OWN = method_leaf_name("own")


@dataclass(frozen=True)
class Ditto(Averaging):
    """With ``lam: 0``, v_i trains as in Local. w is that of FedAvg for every ``lam``."""

    lam: float = 1.0

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared=model.initial, personal=add_prefix(model.initial, _OWN))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        base_loss = self.loss(model)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]
        own_parameters = {_OWN + n for n in parameters}

        def own_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            penalty = sq_dist(self.client_model(model, now), start.shared, parameters)
            return base_loss(now, start, batch) + self.lam / 2 * penalty

        def shared_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return model.loss(model(now.shared, batch.x), batch)

        # neither loss reads what the other step updates, so the order does not matter
        steps = (
            Step(own_loss, own_parameters.__contains__),
            Step(shared_loss, parameters.__contains__),
        )
        return (Phase(train.epochs, steps),)

    def client_model(self, model: Model, v: Variables) -> Tree:
        return select_prefix(v.personal, _OWN)
