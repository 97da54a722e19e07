"""Parameters that matter to a client are averaged over similar clients alone, the others over all.

Wu et al., "Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through
Cautiously Aggressive Collaboration" (FedCAC), ICCV 2023, https://arxiv.org/abs/2309.11103. After
training from w0 to w, in each parameter tensor; then on the server in round t = 0, 1, ...:

    m_i  = 1 for the floor(tau size) entries largest in |(w - w0) w|, else 0   (critical entries)
    O_ij = 1 - ||m_i - m_j||_1 / (2 ||m_i||_1),   mean O and max O over i != j
    C_i  = {i} and all j with O_ij >= mean O + (t + 1) / beta (max O - mean O)
    w_i <- m_i mean_(j in C_i) w_j + (1 - m_i) sum_j p_j w_j                   (start of the next round)

From t + 1 > beta on critical entries are the client's own, unless all overlaps are equal. For
CIFAR-100 the authors take tau = 0.4, beta = 170.
BatchNorm: affine parameters are parameters like the others; statistics stay on the client as in the
official code (``bn_stats: local``) or are averaged (``mean``).
Bytes per client and round: up the uploaded leaves and a bit per parameter; down the mean and the mix,
as the client composes them (a server that knows the masks could send the parameters once).
Deviations: as the official code (Fling), a tensor whose last chosen score is at most 1e-10 takes all
entries above 1e-20 instead; where none is, nothing is critical (there: all). The overlap is compared
with a slack of 1e-12, so that rounding splits no ties. PFLlib resets critical entries to the initial
weights after the first round.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, Offer, Phase, Step, Train, Vars
from ..batch import cross_entropy
from ..bounds import bounded
from ..models.network import Model
from ..tree import Tree, split

_OWN, _MASK = "own.", "critical."  # the mix over C_i and m_i, under the names <prefix><leaf>


@dataclass(frozen=True)
class FedCAC(Algorithm):
    """``tau``: share of critical entries; ``beta``: rounds over which the threshold rises."""

    weights: Literal["samples", "uniform"] = "samples"
    tau: float = 0.5
    beta: float = 100
    bn_stats: Literal["local", "mean"] = "local"

    def __post_init__(self) -> None:
        bounded(self, tau="[0, 1]", beta="(0, inf)")

    def init(self, model: Model, rng: Generator) -> Vars:
        stats, w = split(model.initial, lambda leaf: model.role(leaf) == "stats")
        kept = stats if self.bn_stats == "local" else {}
        own = {_OWN + n: v for n, v in w.items()}
        masks = {_MASK + n: torch.zeros_like(v, dtype=torch.bool) for n, v in w.items()}
        shared = {n: v for n, v in model.initial.items() if n not in kept}
        return Vars(shared, kept | own | masks)

    def begin(self, model: Model, v: Vars, data: Batch) -> Vars:
        return v._replace(shared={n: _composed(v, n) for n in v.shared})

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        def loss(now: Vars, start: Vars, batch: Batch) -> Tensor:  # ``begin`` has composed now.shared
            return cross_entropy(model(now.shared | _stats(now.personal), batch.x), batch)

        return (Phase(train.epochs, (Step(loss, lambda leaf: not leaf.startswith((_OWN, _MASK))),)),)

    def finish(self, model: Model, train: Train, start: Vars, end: Vars, data: Batch) -> Vars:
        w = {n.removeprefix(_OWN): v for n, v in end.personal.items() if n.startswith(_OWN)}
        masks = {_MASK + n: critical(start.shared[n], end.shared[n], self.tau) for n in w}
        return end._replace(personal=end.personal | {_OWN + n: end.shared[n] for n in w} | masks)

    def offer(self, start: Vars, end: Vars) -> Offer:
        masks, rest = split(end.personal, lambda leaf: leaf.startswith(_MASK))
        rows = {n: end.shared[n.removeprefix(_OWN)] for n in rest if n.startswith(_OWN)}
        return Offer(rows, key=torch.cat([m.flatten() for m in masks.values()]))

    def mix(self, gram: Tensor, aux: Tensor, round_: int) -> Tensor:
        itself = torch.eye(len(gram), dtype=torch.bool)
        size = gram.diagonal()[:, None]
        overlap = 1 - (size + size.T - 2 * gram) / (2 * size.clamp(min=1))
        pairs = overlap[~itself]
        if not len(pairs):
            return torch.ones_like(gram)
        threshold = pairs.mean() + (round_ + 1) / self.beta * (pairs.max() - pairs.mean())
        together = (overlap >= threshold - 1e-12) | itself
        return together / together.sum(1, keepdim=True).to(gram)

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return {n: _composed(v, n) for n in v.shared} | _stats(v.personal)


def critical(start: Tensor, end: Tensor, tau: float) -> Tensor:
    """m: where |(w - w0) w| is among the floor(tau size) largest of the tensor."""
    score, count = ((end - start) * end).abs(), int(tau * end.numel() + 1e-9)
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.flatten().topk(count).values[-1]
    least = torch.where(least > 1e-10, least, torch.where(score > 1e-20, score, torch.inf).min())
    return score >= least


def _composed(v: Vars, leaf: str) -> Tensor:
    """What the client makes of a shared leaf; right after training, what it trained."""
    if _OWN + leaf not in v.personal:
        return v.shared[leaf]
    return torch.where(v.personal[_MASK + leaf], v.personal[_OWN + leaf], v.shared[leaf])


def _stats(personal: Tree) -> Tree:
    """The statistics that stay on the client."""
    return {n: v for n, v in personal.items() if not n.startswith((_OWN, _MASK))}
