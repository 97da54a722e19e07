"""Every client starts from a learned mix of the global model and its own last model.

Zhang et al., "FedALA: Adaptive Local Aggregation for Personalized Federated Learning", AAAI 2023,
https://arxiv.org/abs/2212.01197, Algorithm 1. g is the received model and o_i the client's own last
model. A_i has one weight for every number of the top p layers:

    w_i  =  o_i + (g - o_i) * A_i  in the top p layers,  g  below                      (4)
    A_i <-  clip(A_i - eta dL_i(w_i) / dA_i, 0, 1)  on s % of the data, then (4) again  (5)
    w_i <-  local SGD on L_i from (4);  o_i <- w_i;  g <- sum_i (n_i / n) w_i

A_i starts at 1 and is kept between rounds. Only the top p layers of o_i are kept. In round 1 A_i
has no gradient, since o_i = g. The accuracy is that of the model (4) with which the next round will
start: A_i is learned on a copy.

BatchNorm: statistics are averaged, not mixed. (5) normalises by the statistics of its batches and
does not update the running ones. Bytes per client and round: all leaves up, all leaves down. A_i
and o_i are never sent. Deviations: the authors' first (5) runs until the last 10 losses have a
standard deviation below 0.1, at least 11 epochs; here it has ``start_epochs`` epochs, in round 2,
also for a client that was absent in round 1. In their code absent clients also do (5) and keep the
mix as o_i; here absent clients stay unchanged. Their s % are neighbouring samples, here a random
choice. Their ``layer_idx`` counts tensors, p counts layers. PFLlib drops the last batch. (4) is
computed by torch.lerp, which is exact at both ends.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, LocalTraining, Phase, Sgd, Step, Variables, Visit
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

_OWN = method_leaf_name("own")
_A = method_leaf_name("A")


@dataclass(frozen=True)
class FedALA(Algorithm):
    """``A.<leaf>`` and ``own.<leaf>`` are personal."""

    eta: float = 1.0  # [1] learning rate of A_i in (5); default: the authors' code
    s: float = 80.0  # [%] part of the client's data that (5) uses; default: the authors' code
    p: int = 1  # [layers with parameters] top layers that are mixed; default: the authors' code
    # [epochs] (5) in round 2, later it has one; default: the least number of the authors' code
    start_epochs: int = 11

    def __post_init__(self) -> None:
        bounded(self, eta="[0, inf)", s="(0, 100]", p="[1, inf)", start_epochs="[1, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        self.mixed_leaves(model)

    def mixed_leaves(self, model: Model) -> list[str]:
        """The names of the mixed leaves. Raises ValueError if the model has fewer than p layers."""
        owner = {
            n: n.rpartition(".")[0] for n, leaf in model.leaves.items() if leaf.role != "stats"
        }
        layers = list(dict.fromkeys(owner.values()))  # in the order of registration
        if self.p > len(layers):
            raise ValueError(
                f"p = {self.p}: must be at most {len(layers)}, the layers of the model"
            )
        return [n for n in owner if owner[n] in layers[-self.p :]]

    def init(self, model: Model, rng: Generator) -> Variables:
        own_leaves = {_OWN + n: model.initial[n] for n in self.mixed_leaves(model)}
        ones = {_A + n: torch.ones_like(model.initial[n]) for n in self.mixed_leaves(model)}
        return Variables(model.initial, own_leaves | ones)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def keep_model(start: Variables, now: Variables, data: Batch) -> Variables:
            own = {_OWN + n: now.shared[n] for n in self.mixed_leaves(model)}
            return now._replace(personal=now.personal | own)

        phase = Phase(train.epochs, (Step(self.loss(model), model.leaves.__contains__),))
        return *self.personalize(model, train, round_), phase, Visit(keep_model)

    def personalize(
        self, model: Model, train: LocalTraining, round_: int
    ) -> tuple[Phase | Visit, ...]:
        """A phase that learns A_i, eq. (5), and a visit that applies the mix, eq. (4)."""
        leaves = self.mixed_leaves(model)

        def mixture(v: Variables) -> Tree:
            return {
                n: torch.lerp(v.personal[_OWN + n], v.shared[n], v.personal[_A + n]) for n in leaves
            }

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            w = model.detach_tree(now.shared) | mixture(now)
            return model.loss(model(w, batch.x), batch)

        learn_step = Step(
            loss, {_A + n for n in leaves}.__contains__, lambda _: Sgd(self.eta), clamp=(0.0, 1.0)
        )

        def sample_limit(size):
            return max(1, int(size * self.s / 100))

        def apply_mixture(start: Variables, now: Variables, data: Batch) -> Variables:
            return now._replace(shared=now.shared | mixture(now))

        epochs = self.start_epochs if round_ == 1 else 1
        phase = Phase(epochs, (learn_step,), stream="aggregation", limit=sample_limit)
        return phase, Visit(apply_mixture)
