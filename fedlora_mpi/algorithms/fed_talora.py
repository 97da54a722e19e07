"""LoRA factors shared by all tasks and averaged exactly; the classifier grows with the classes.

Yu et al., "Task-agnostic Low-rank Residual Adaptation for Efficient Federated Continual
Fine-Tuning" (Fed-TaLoRA), 2025, https://arxiv.org/abs/2505.12318. The weights are W_0 + W + s B A,
and h_c is row c of the classifier. A client of the round owns class c if it has n_kc > 0 samples of
it. A class is seen once a client of any cohort has owned it:

    A, B, W  as in FedEx-LoRA:  W <- W + R,  R = sum_k p_k s B_k A_k - s B A,  p_k = n_k / n
    h_c  <-  sum_{k owns c} n_k h_ck / sum_{k owns c} n_k      c without an owner: h_c stays
    seen <-  seen, or owned in this round

The softmax covers only some classes. In training they are the classes seen before and the client's
own; in an evaluation they are the classes seen, or all classes while none is seen.

No task has its own factors or its own W. New tasks only add to the classifier rows that are sent.
If all clients have all classes, the method is FedEx-LoRA. If ``full`` does not name head, no row is
owned and all classes count as seen.

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm.

Bytes per client and round: up 4 (r_k (d_out + d_in) for each decomposed weight, and the
classifier's rows of the classes that the client owns). Down the same, but with the rows of all
classes seen, and from round 2 on R: 4 d_out d_in for each weight, or 4 (k - 1) r (d_out + d_in)
after a round of k clients. The message that says which classes these are is not counted. A client
that was absent would need R of all rounds that it missed; only the last R is counted.

Deviations: only the abstract could be read. Its residual weight update is taken to be the identity
of FedEx-LoRA; the owners' means and the masks are ours. All rows exist from the start, with the
network's initial values.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Aggregate, LocalTraining, Phase, Svd, Term, Update, Upload, Variables, Visit
from ..components.lora.calibrated import CalibratedTuning
from ..components.lora.class_rows import (
    OWN,
    SEEN,
    check_rows,
    keep_other_rows,
    mark_own_classes,
    marked_numel,
    mask_unseen,
    mean_of_owners,
)
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model


@dataclass(frozen=True)
class FedTaLoRA(CalibratedTuning):
    """Further shared leaves: "seen.<leaf>" [classes] for each leaf of the classifier, 1 for a row
    that some client has owned. A client also has "own.<leaf>", 1 for its own classes, which count
    as seen for it.
    """

    needs_class_labels = True

    def check(self, model: Model, train: LocalTraining) -> None:
        super().check(model, train)
        check_rows("fed_talora", model)

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        rows = [n for n in shared if model.role(n) == "head"]
        return Variables(shared | {SEEN + n: torch.zeros(model.classes) for n in rows}, personal)

    def receive(self, shared: Tree) -> Tree:
        no_rows = {n: torch.zeros_like(v) for n, v in select_prefix(shared, SEEN).items()}
        return super().receive(shared) | add_prefix(no_rows, OWN)

    def received_numel(self, server: Tree, shared: Tree, round_: int) -> int:
        return marked_numel(self.receive(shared), SEEN) + self.residual_numel(server, shared)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        return Visit(mark_own_classes), *super().local(model, train, round_)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        leaves = super().upload(start, end, round_).mean
        mean = {n: v for n, v in leaves.items() if not n.startswith(SEEN)}
        return Upload(mean, numel=marked_numel(mean, OWN))

    def make_term(self, upload: Upload, shared: Tree, weight: int) -> Term:
        rows = keep_other_rows(upload.mean, shared)
        return super().make_term(Upload(upload.mean | rows), shared, weight)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        update = super().server_update(server, shared, aggregate, svd)
        rows = mean_of_owners(aggregate.mean, shared)
        return update._replace(shared=update.shared | rows)

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        return mask_unseen(super().logits(model, v, x), v.shared)
