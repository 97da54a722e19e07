"""LoRA factors shared by all tasks and averaged exactly; the classifier grows with the classes.

Yu et al., "Task-agnostic Low-rank Residual Adaptation for Efficient Federated Continual
Fine-Tuning", 2025, https://arxiv.org/abs/2505.12318. The weights are W_0 + W + s B A, and h_c is
row c of the classifier. A client of the round owns class c if it has n_kc > 0 samples of it. A
class is seen once a client of any cohort has owned it:

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

from ..algorithm import Batch, Cohort, LocalTraining, Variables
from ..components.lora.calibrated import CalibratedTuning
from ..core.names import is_factor, method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_SEEN = method_leaf_name("seen")
_OWN = method_leaf_name("own")


@dataclass(frozen=True)
class FedTaLoRA(CalibratedTuning):
    """Further shared leaves: "seen.<leaf>" [classes] for each leaf of the classifier, 1 for a row
    that some client has owned. A client also has "own.<leaf>", 1 for its own classes, which count
    as seen for it.
    """

    def check(self, model: Model, train: LocalTraining) -> None:
        super().check(model, train)
        for name, leaf in model.leaves.items():
            if leaf.role == "head" and leaf.shape[:1] != (model.classes,):
                raise ValueError(
                    f"name = fed_talora: needs a head with a row for each class; {name} is "
                    f"{list(leaf.shape)}"
                )

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        rows = [n for n in shared if model.role(n) == "head"]
        return Variables(shared | {_SEEN + n: torch.zeros(model.classes) for n in rows}, personal)

    def download(self, shared: Tree) -> Tree:
        no_rows = {n: torch.zeros_like(v) for n, v in select_prefix(shared, _SEEN).items()}
        return super().download(shared) | add_prefix(no_rows, _OWN)

    def begin(self, model: Model, v: Variables, data: Batch) -> Variables:
        shared, owned_rows = v.shared, (data.counts > 0).to(data.counts)
        for n, seen in select_prefix(v.shared, _SEEN).items():
            shared = shared | {_OWN + n: owned_rows, _SEEN + n: torch.maximum(seen, owned_rows)}
        return v._replace(shared=shared)

    def upload(self, start: Variables, end: Variables) -> Tree:
        return {n: v for n, v in super().upload(start, end).items() if not n.startswith(_SEEN)}

    def upload_numel(self, start: Variables, end: Variables) -> Tensor | int:
        return _message_numel(self.upload(start, end), _OWN)

    def download_numel(self, shared: Tree) -> Tensor | int:
        return _message_numel(self.download(shared), _SEEN) + self.residual_numel(shared)

    def expand(self, upload: Tree, shared: Tree, count: int) -> Tree:
        """A row that the client does not own enters the mean unchanged."""
        owned_rows = select_prefix(upload, _OWN)
        rows = {
            n: torch.where(_broadcast_rows(o, shared[n]) > 0, upload[n], shared[n])
            for n, o in owned_rows.items()
        }
        return super().expand(upload | rows, shared, count)

    def server_update(
        self, server: Tree, shared: Tree, mean: Tree, cohort: Cohort
    ) -> tuple[Tree, Tree]:
        server, new = super().server_update(server, shared, mean, cohort)
        for n, owners in select_prefix(mean, _OWN).items():
            p = _broadcast_rows(owners, shared[n])  # total weight of each row's owners
            # remove the unchanged rows of the other clients from the mean
            moved = (mean[n] - (1 - p) * shared[n]) / p
            new |= {n: torch.where(p > 0, moved, shared[n])}
            new |= {_SEEN + n: torch.where(owners > 0, 1, shared[_SEEN + n])}
        return server, new

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        logits = super().logits(model, v, x)
        # the mask is the same for all leaves of the classifier
        for seen in list(select_prefix(v.shared, _SEEN).values())[:1]:
            # at most e^-100 of the softmax; finite, so the loss is finite if the label is masked
            floor = logits.detach().amin(1, keepdim=True) - 100
            logits = torch.where((seen > 0) | (seen == 0).all(), logits, floor)
        return logits


def _message_numel(tree: Tree, marks: str) -> Tensor | int:
    """How many numbers of ``tree`` are sent: all except W and the marks; of the classifier only the
    marked rows.
    """
    marked = select_prefix(tree, marks)
    total: Tensor | int = 0
    for n, v in tree.items():
        if not n.startswith((_OWN, _SEEN)) and not is_factor(n, "W"):
            total += marked[n].sum().long() * v[0].numel() if n in marked else v.numel()
    return total


def _broadcast_rows(row_values: Tensor, leaf: Tensor) -> Tensor:
    """Reshape [classes] so that it multiplies ``leaf`` [classes, ...] row by row."""
    return row_values.view(-1, *[1] * (leaf.dim() - 1))
