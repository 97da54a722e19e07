"""FedAvg, and beside it a model of each client's own that is pulled towards the shared one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221, Algorithm 1. w is the shared model as received, v_i the client's
own, which persists:

    w_i  <-  argmin F_i(w_i) from w                       w  <-  sum_i (n_i / n) w_i
    v_i  <-  v_i - eta (grad F_i(v_i) + lam (v_i - w))    on the same batches

The client's own model is v_i.

BatchNorm: v_i has statistics of its own, which are not pulled; those of w are averaged. Bytes per
client and round: all leaves up, all leaves down. Deviations: none. lam is that of the authors'
FMNIST script; theirs chooses among 0.1, 1 and 2 by validation loss if asked. PFLlib trains v_i
first, in epochs of its own (``plocal_epochs``) and calls lam mu.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, Phase, Step, Train, Vars
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.names import own_name
from ..core.tree import Tree, prefixed, sq_dist, under
from ..models.network import Model

_OWN = own_name("own")


@dataclass(frozen=True)
class Ditto(Algorithm):
    """``lam: 0`` trains v_i as Local does; w is FedAvg's at any ``lam``."""

    lam: float = 1.0
    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "exclude"

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Vars:
        return Vars(shared=model.initial, personal=prefixed(model.initial, _OWN))

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        own = self.loss(model)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]
        owned = {_OWN + n for n in parameters}

        def personal(now: Vars, start: Vars, batch: Batch) -> Tensor:
            pull = sq_dist(self.weights_of(model, now), start.shared, parameters)
            return own(now, start, batch) + self.lam / 2 * pull

        def shared(now: Vars, start: Vars, batch: Batch) -> Tensor:
            return cross_entropy(model(now.shared, batch.x), batch)

        # No loss reads what the other step moves, so the order has no effect on the models.
        steps = Step(personal, owned.__contains__), Step(shared, parameters.__contains__)
        return (Phase(train.epochs, steps),)

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return under(v.personal, _OWN)
