"""Clients with different networks align their class features with the global mean of each class.

Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
https://arxiv.org/abs/2105.00243. The features z [d] are the input of the head. P_c is the global
prototype of class c, P_kc that of client k, N_c the clients of the round that hold c:

    w_k   <-  argmin CE + lam mean_d (z - P_y)^2              no second term where P_y is unknown
    P_kc  <-  mean of z over the samples of k with y = c, after training
    P_c   <-  1/|N_c| sum_(k in N_c) P_kc                           (``weights: uniform``)
    P_c   <-  sum_(k in N_c) n_kc P_kc / sum_(k in N_c) n_kc        (``samples``)

Round 1 has no prototype term. If no client of a round holds a class, the class is unknown in the
next round; with ``absent: stale`` it keeps its prototype. ``inference: classifier`` predicts with
the network. ``inference: prototypes`` predicts the class of the nearest P_c. The candidates are all
known classes (``among: known``) or the known classes that the client has in its training data
(``own``; all known classes if it has none of them).

BatchNorm: all of it is the client's own. Prototypes use features in evaluation mode. Bytes per
client and round: up d numbers for each class that the client holds, down d for each known class.
The class indices and sample counts that go with them are not counted. Deviations: the authors' code
computes P_kc during the last epoch, while the model changes. Here P_kc comes from the trained model
and all training data. The mean of the authors' code is ``uniform``, the paper's is ``samples``. The
paper predicts by prototypes, the authors' code in both ways, HtFLlib by prototypes with ``known``.
With ``inference: prototypes``, ``accuracy_trained`` uses the client's own P_kc.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import (
    Algorithm,
    Batch,
    LocalTraining,
    Phase,
    Step,
    Transport,
    Upload,
    Variables,
    Visit,
)
from ..components.prototypes import (
    MEANS,
    SHARES,
    client_class_means,
    known_numel,
    prototype_loss,
    prototypes,
)
from ..core.batch import cross_entropy
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..models.network import Model

_OWN_CLASSES = method_leaf_name("own", "classes")


@dataclass(frozen=True)
class FedProto(Algorithm):
    """``class.means`` and ``class.shares`` are means over clients; their quotient is P.
    ``own.classes`` is 1 for a class that the client holds, else 0.
    """

    lam: float = 1.0
    inference: Literal["classifier", "prototypes"] = "classifier"
    among: Literal["own", "known"] = "own"
    weights: Literal["uniform", "samples"] = "uniform"
    absent: Literal["exclude", "stale"] = "exclude"

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if not (model.head and model.ends_in_linear):
            raise ValueError(
                "name = fedproto: needs a network with a body and a Linear classifier at its end"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        means = torch.zeros(model.all_leaves[f"{model.head}.weight"].shape)  # [classes, d]
        return Variables(
            {MEANS: means, SHARES: means[:, 0]}, model.initial | {_OWN_CLASSES: means[:, 0]}
        )

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        lam = self.lam if round_ else 0.0

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            w = self.client_model(model, now)
            z = model.features(w, batch.x)
            fit = cross_entropy(model.classify(w, z), batch)
            P, known = prototypes(start.shared)
            return fit + lam * prototype_loss(z, P, batch, known) if lam else fit

        def show(start: Variables, now: Variables, data: Batch) -> Variables:
            w, holds_class = self.client_model(model, now), (data.counts > 0).to(data.counts)
            share = holds_class if self.weights == "uniform" else data.counts / data.counts.sum()
            means = client_class_means(lambda x: model.eval_mode().features(w, x), data)
            class_leaves = {MEANS: share[:, None] * means, SHARES: share}
            return Variables(class_leaves, now.personal | {_OWN_CLASSES: holds_class})

        phase = Phase(train.epochs, (Step(loss, model.leaves.__contains__),))
        return phase, Visit(show, all_data=True)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(mean=end.shared, numel=known_numel({}, end.shared, round_))

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, download_numel=known_numel)

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        """The logits [B, classes]. With ``inference: prototypes`` they are -mean_d (z - P_c)^2
        without the term of z alone, which is the same for all classes.
        """
        if self.inference == "classifier":
            return super().logits(model, v, x)
        P, known = prototypes(v.shared)
        own_classes = known & (v.personal[_OWN_CLASSES] > 0)
        candidates = (
            torch.where(own_classes.any(), own_classes, known) if self.among == "own" else known
        )
        z = model.features(self.client_model(model, v), x)
        scores = (2 * z @ P.T - P.square().sum(1)) / P.shape[1]  # [B, classes]
        return torch.where(candidates, scores, scores.amin(1, keepdim=True) - 100)
