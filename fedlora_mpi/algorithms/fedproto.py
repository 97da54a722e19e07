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
known classes (``among: known``) or those of the client's training data (``own``; all if none is).

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

from torch import Generator, Tensor

from ..algorithm import (
    Batch,
    LocalTraining,
    Phase,
    Step,
    Transport,
    Upload,
    Variables,
    Visit,
)
from ..components.averaging import Averaging
from ..components.prototypes import (
    MEANS,
    SHARES,
    aligned_loss,
    check_features,
    client_class_means,
    known_numel,
    nearest_scores,
    no_prototypes,
    prototypes,
)
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..models.network import Model

_OWN_CLASSES = method_leaf_name("own", "classes")


@dataclass(frozen=True)
class FedProto(Averaging):
    """P is ``class.means / class.shares``; ``own.classes`` is 1 where a client holds the class."""

    needs_class_labels = True
    lam: float = 1.0  # [1] weight of the prototype term; default: the authors' code
    # what predicts; default: our choice of the authors' two ways, as other methods
    inference: Literal["classifier", "prototypes"] = "classifier"
    among: Literal["own", "known"] = "own"  # candidates of prototypes; default: the authors' code
    weights: Literal["samples", "uniform"] = "uniform"  # default: the authors' code

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        check_features("fedproto", model)

    def init(self, model: Model, rng: Generator) -> Variables:
        shared = no_prototypes(model)
        return Variables(shared, model.initial | {_OWN_CLASSES: shared[SHARES]})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        lam = self.lam if round_ else 0.0

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            w = self.client_model(model, now)
            return aligned_loss(model, w, batch, lam, *prototypes(start.shared))

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
        """The logits [B, classes]; with ``inference: prototypes``, the scores of the classes."""
        if self.inference == "classifier":
            return super().logits(model, v, x)
        z = model.features(self.client_model(model, v), x)
        own = v.personal[_OWN_CLASSES] > 0 if self.among == "own" else None
        return nearest_scores(z, v.shared, own)
