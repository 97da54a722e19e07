"""Clients predict with a learned mixture of their own network and a small shared one.

Qin et al., "FedAPEN: Personalized Cross-silo Federated Learning with Adaptability to Statistical
Heterogeneity", KDD 2023, https://doi.org/10.1145/3580305.3599344. Client k has its own network p, a
copy of the small network s, and a weight w in [0, 1], which starts at 0.5. Below, p and s stand for
the logits of the networks:

    L_p  =  CE(p) + KL(softmax(s) || softmax(p)) + CE(w p + (1 - w) s)      s a constant
    L_s  =  CE(s) + KL(softmax(p) || softmax(s)) + CE(w p + (1 - w) s)      p a constant
    p, s  <-  descend on L_p, on L_s        s  <-  (1/N) sum_k s_k
    w  <-  clip(w - eta_w grad CE(w p + (1 - w) s), 0, 1)
           w_epochs, on samples held out, after the mean

The client predicts with w p + (1 - w) s. The fraction ``held_out`` of its samples trains only w,
neither network. ``client_model`` returns p alone. ``train_loss`` is L_p + L_s.

BatchNorm: that of p is personal; running statistics of s are averaged. Learning w updates no
statistics.

Bytes per client and round: all leaves of s up, all leaves of s down.

Deviations: w is learned from the second round on, before it is used: on a copy for every
evaluation, and in the same way when the client next trains. The authors initialise every client's
network differently; here all clients with the same architecture start equal.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Sgd, Step, Variables
from ..components.companion import Companion
from ..core.batch import cross_entropy, kl_divergence, mean
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..models.network import Model

_MIX_W = method_leaf_name("mix", "w")


@dataclass(frozen=True)
class FedAPEN(Companion):
    """The personal leaf "mix.w" is w."""

    # whether w stays 0.5 (FedEN), on the same held-out samples; default: the paper's FedAPEN
    equal: bool = False
    # [share of a client's samples] held out to train w alone; default: the authors' code
    held_out: float = 0.05
    w_epochs: int = 10  # [epochs] training of w each time; default: the authors' code
    w_lr: float = 1e-3  # [1] eta_w, the learning rate of w; default: the authors' code

    def __post_init__(self) -> None:
        bounded(self, held_out="[0, 1)", w_epochs="[0, inf)", w_lr="(0, inf)")
        if not (self.equal or self.held_out):
            raise ValueError(
                "held_out = 0: leaves nothing to learn w on; give a fraction above 0, or equal: "
                "true"
            )

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        return Variables(shared, personal | {_MIX_W: torch.tensor(0.5)})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            p, s = self.both_logits(model, now, batch)
            w = now.personal[_MIX_W]
            mutual_loss = mean(kl_divergence(s.detach(), p) + kl_divergence(p.detach(), s), batch)
            mixture_loss = cross_entropy(w * p + (1 - w) * s.detach(), batch)
            mixture_loss = mixture_loss + cross_entropy(w * p.detach() + (1 - w) * s, batch)
            # L_p + L_s
            return cross_entropy(p, batch) + cross_entropy(s, batch) + mutual_loss + mixture_loss

        return *self.personalize(model, train, round_), Phase(
            train.epochs, (Step(loss, self.trained_leaves(model)),)
        )

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        if self.equal:
            return ()
        eval_model = model.eval_mode()

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return cross_entropy(self.logits(eval_model, now, batch.x), batch)

        step = Step(loss, _MIX_W.__eq__, lambda _: Sgd(self.w_lr), clamp=(0.0, 1.0))
        return (Phase(self.w_epochs * (round_ > 0), (step,), stream="adaptability", held_out=True),)

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        w, s = v.personal[_MIX_W], self.g(model).to(x.device)(self.g_leaves(v), x)
        return w * super().logits(model, v, x) + (1 - w) * s
