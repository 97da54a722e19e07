"""One set of LoRA factors for all tasks of class-incremental learning, with exact aggregation and a growing classifier.

Yu et al., "Efficient Federated Class-Incremental Learning of Pre-Trained Models via Task-agnostic Low-rank Residual
Adaptation", 2025, https://arxiv.org/abs/2505.12318. Factors and residual as in FedEx-LoRA (``Calibrated``):

    W  <-  W + s (sum_k p_k B_k A_k - B A)      A, B  <-  their means,  p_k = n_k / n
    h_c  <-  sum_k n_k h_{k,c} / sum_k n_k  over the clients that have samples of class c, for the head's rows

A class that nobody has had so far has no logit: it is masked in training and in evaluation. No parameter is of a
task, so nothing grows with their number but the classes of the head.

Tasks are the data's (``data.tasks``): sets of classes that arrive one after the other.
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: as FedEx-LoRA, and a flag for each class up and down.
Deviations: of the paper its abstract could be read; placement of the factors (here ``layers``), ranks and the form
of the residual on its way are derived. Before any class is known all logits count.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, Train, Vars
from ..finetuning import Calibrated
from ..models.network import Model
from ..tree import Tree


@dataclass(frozen=True)
class FedTaLoRA(Calibrated):
    """Further shared leaves: "seen" [classes], classes that somebody has had; "mine" [classes], those of the client in
    this round."""

    def check(self, model: Model, train: Train) -> None:
        super().check(model, train)
        if self.full != ("head",):
            raise ValueError(f"full = {list(self.full)}: must be [head], whose rows are those of the classes")

    def init(self, model: Model, rng: Generator) -> Vars:
        shared, personal = super().init(model, rng)[:2]
        return Vars(shared | {"seen": torch.zeros(model.classes), "mine": torch.zeros(model.classes)}, personal)

    def begin(self, model: Model, v: Vars, data: Batch) -> Vars:
        return v._replace(shared=v.shared | {"mine": (data.counts > 0).to(v.shared["mine"].dtype)})

    def logits(self, model: Model, v: Vars, x: Tensor) -> Tensor:
        known = torch.maximum(v.shared["seen"], v.shared["mine"])
        known = torch.where(known.sum() > 0, known, torch.ones_like(known))
        return super().logits(model, v, x).masked_fill(known == 0, -1e9)

    def upload(self, start: Vars, end: Vars) -> Tree:
        return {n: v for n, v in super().upload(start, end).items() if n != "seen"}

    def full_terms(self, upload: Tree) -> Tree:
        """The head's rows of the client's classes alone."""
        mine = upload["mine"]
        rows = lambda v: v * mine.view(-1, *[1] * (v.dim() - 1))
        return {n: v if n == "mine" else rows(v) for n, v in super().full_terms(upload).items()}

    def combined(self, shared: Tree, mean: Tree) -> Tree:
        owned = mean["mine"]
        wide = lambda v: owned.view(-1, *[1] * (v.dim() - 1))
        head = {n: torch.where(wide(v) > 0, v / wide(v), shared[n]) for n, v in mean.items() if n != "mine"}
        seen = torch.maximum(shared["seen"], (owned > 0).to(owned.dtype))
        return head | {"seen": seen, "mine": torch.zeros_like(seen)}
