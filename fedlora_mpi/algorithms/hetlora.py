"""LoRA of ranks that clients prune by themselves, weighted by how much they have learned.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
https://arxiv.org/abs/2401.06432. Client k has r_k components of the server's A and B; tail: the last ones, from
floor(gamma r_k) on:

    L_k       =   CE + lam sum over layers ||B_k tail||_F ||A_k tail||_F
    r_k      <-   max(lora_rank_min, floor(gamma r_k))      if that sum has fallen in the training
    A, B     <-   sum_k S_k A_k / sum_j S_j, the same of B_k      S_k = ||B_k A_k||_F over all layers

Factors count with zeros up to the largest rank. S_k^2 = sum over layers of sum (B'B * A A') needs no product. Where
nothing has been learned, S = 0, clients count equally.
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: 4 (r_k (d_out + d_in) for each decomposed weight, what is trained in full, and S_k) up, of
the pruned rank; down of the rank before any pruning, for the server does not need to know it.
Deviations: gamma and lam are those of a third party's configuration, the paper's could not be read; its least rank
is 5. The head is trained in full and averaged by n_k.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, Loss, Train, Vars
from ..bounds import bounded
from ..finetuning import FineTuning
from ..lowrank import is_factor
from ..models.network import Model
from ..tree import Tree, numel, split


@dataclass(frozen=True)
class HetLoRA(FineTuning):
    """Personal leaf "components": r_k. What is pruned is zero in A and in B, so that no gradient revives it."""

    gamma: float = 0.99
    lam: float = 0.01
    lora_rank_min: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, gamma="(0, 1]", lam="[0, inf)", lora_rank_min="[1, inf)")

    def init(self, model: Model, rng: Generator) -> Vars:
        return Vars(super().init(model, rng).shared, {"components": torch.tensor(float(max(self.lora_ranks)))})

    def begin(self, model: Model, v: Vars, data: Batch) -> Vars:
        return v._replace(shared=kept(v.shared, 0, v.personal["components"]))

    def loss(self, model: Model) -> Loss:
        fit = super().loss(model)
        return lambda now, start, batch: fit(now, start, batch) + self.lam * self.score(now)

    def score(self, v: Vars) -> Tensor:
        """sum over layers of ||B tail||_F ||A tail||_F, [], for the client's present r_k."""
        r = v.personal["components"]
        tail = kept(split(v.shared, is_factor)[0], torch.floor(self.gamma * r), r)
        norm = {n: w.square().sum().clamp(min=1e-24).sqrt() for n, w in tail.items()}  # its gradient at 0 is 0
        return sum(norm[n] * norm[f"{n[:-1]}B"] for n in norm if n.endswith(".A"))

    def finish(self, model: Model, train: Train, start: Vars, end: Vars, data: Batch) -> Vars:
        r = end.personal["components"]
        fewer = torch.floor(self.gamma * r).clamp(min=self.lora_rank_min).minimum(r)
        r = torch.where(self.score(end) < self.score(start), fewer, r)
        return Vars(kept(end.shared, 0, r), end.personal | {"components": r})

    def sent(self, start: Vars, end: Vars) -> Tensor:
        factors, full = split(self.upload(start, end), is_factor)
        rows = lambda n, v: (v.shape[0] if n.endswith(".A") else v.shape[1])
        r = end.personal["components"]
        return 1 + numel(full) + sum(r.clamp(max=rows(n, v)) * (v.numel() // rows(n, v)) for n, v in factors.items())

    def weight(self, upload: Tree, shared: Tree, count: int) -> Tree:
        """S_k, and so little more that nothing is divided by zero."""
        names = [n.removesuffix(".A") for n in upload if n.endswith(".A")]
        gram = lambda n: (upload[f"{n}.B"].T @ upload[f"{n}.B"]) * (upload[f"{n}.A"] @ upload[f"{n}.A"].T)
        square = self.s**2 * sum(gram(n).sum() for n in names)
        return dict.fromkeys(names, square.clamp(min=0).sqrt() + 1e-12)


def kept(tree: Tree, first: Tensor | int, last: Tensor) -> Tree:
    """``tree`` with zeros in the factors' components before ``first`` and from ``last`` on."""

    def masked(n: str, v: Tensor) -> Tensor:
        at = torch.arange(v.shape[0 if n.endswith(".A") else 1], device=v.device)
        mask = ((at >= first) & (at < last)).to(v.dtype)
        return v * (mask[:, None] if n.endswith(".A") else mask)

    return {n: masked(n, v) if is_factor(n) else v for n, v in tree.items()}
