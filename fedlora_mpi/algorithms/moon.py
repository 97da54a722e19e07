"""FedAvg with a loss that pulls features to the global model's and away from the previous model's.

Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021,
https://arxiv.org/abs/2103.16257, Section 3.3 and Algorithm 1. z are the features of the model in
training, z_glob those of the received model, z_prev those of the client's previous model, as it was
at the end of the last round in which the client participated:

    l_con  =  -log( exp(cos(z, z_glob) / tau)
                    / (exp(cos(z, z_glob) / tau) + exp(cos(z, z_prev) / tau)) )
    w_i    <-  argmin CE + mu l_con, from w        w <- sum_i (n_i / n) w_i

Before a client's first participation z_prev comes from the initial model. In round 1 the received
model is the same initial model, so l_con has no gradient.

BatchNorm: running statistics are averaged. The two teachers run in evaluation mode with their own
statistics, as in the authors' code (PFLlib and Fling: in training mode). Bytes per client and
round: all leaves up and down; the previous model stays on the client. Deviations: z is the input of
the classifier. The authors insert two Linear layers (out 256) before the classifier and take z
after them. A client keeps one previous model, as with the authors' ``model_buffer_size`` 1. The
default mu is the authors' value for CIFAR-10. Their code has no l_con in round 1. If a client first
takes part later, its z_prev there comes from a random network of its own, and here from the common
initial model: all clients start equal, and either network has learned nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables, Visit
from ..components.averaging import Averaging
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_OWN = method_leaf_name("own")


@dataclass(frozen=True)
class MOON(Averaging):
    """The personal leaves "own.<leaf>" are the previous model without its head."""

    mu: float = 5.0  # [1] weight of l_con; 0: FedAvg; default: the authors' value for CIFAR-10
    tau: float = 0.5  # [1] temperature of l_con; default: the authors' code

    def __post_init__(self) -> None:
        bounded(self, mu="[0, inf)", tau="(0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if not model.ends_in_linear:
            raise ValueError(
                "name = moon: needs a network that ends in a Linear; "
                f"{model.head or 'the last layer'} is none, or not alone and last"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared=model.initial, personal=_own_body(model, model.initial))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        teacher = model.eval_mode()

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            z = model.features(now.shared, batch.x)
            previous = select_prefix(start.personal, _OWN)
            z_glob, z_prev = (teacher.features(tree, batch.x) for tree in (start.shared, previous))
            fit = model.loss(model.classify(now.shared, z), batch)
            return fit + self.mu * self.contrastive_loss(z, z_glob, z_prev, batch)

        def keep_model(start: Variables, now: Variables, data: Batch) -> Variables:
            return Variables(now.shared, _own_body(model, now.shared))

        step = Step(loss, lambda leaf: model.role(leaf) is not None)
        return Phase(train.epochs, (step,)), Visit(keep_model)

    def contrastive_loss(self, z: Tensor, z_glob: Tensor, z_prev: Tensor, batch: Batch) -> Tensor:
        """The mean of l_con over the real examples, []. Features: [B, width]."""
        similarities = [
            F.cosine_similarity(z, other, dim=1) / self.tau for other in (z_glob, z_prev)
        ]
        first = batch.y.new_zeros(len(batch.y), dtype=torch.int64)
        return cross_entropy(torch.stack(similarities, 1), batch._replace(y=first))


def _own_body(model: Model, tree: Tree) -> Tree:
    """The leaves of ``tree`` that compute features, under the names of the client's
    previous model.
    """
    return add_prefix({n: v for n, v in tree.items() if model.role(n) != "head"}, _OWN)
