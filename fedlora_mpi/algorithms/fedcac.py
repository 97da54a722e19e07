"""Parameters critical to a client are averaged over similar clients only, the others over all.

Wu et al., "Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through
Cautiously Aggressive Collaboration" (FedCAC), ICCV 2023, https://arxiv.org/abs/2309.11103. Client i
trains from w0 to w and finds m_i in each parameter tensor. The server does the rest, in round t =
0, 1, ...:

    m_i  = 1 for the floor(tau size) entries largest in |(w - w0) w|, else 0   (critical entries)
    O_ij = 1 - ||m_i - m_j||_1 / (2 ||m_i||_1),   mean O and max O over i != j
    C_i  = {i} and all j with O_ij >= mean O + (t + 1) / beta (max O - mean O)
    w_i <- m_i mean_(j in C_i) w_j + (1 - m_i) sum_j p_j w_j         (start of the next round)

From t + 1 > beta on, C_i = {i}: critical entries stay with the client, unless all overlaps are
equal.

BatchNorm: affine parameters are treated like all parameters. Statistics stay on the client, as in
the official code (``bn_stats: local``), or are averaged (``mean``).

Bytes per client and round: up the uploaded leaves and one bit per parameter. Down the mean and the
mix, which the client combines. (A server that knows the masks could send the parameters once.)

Deviations: as in the official code (Fling), if the smallest selected score of a tensor is at most
1e-10, all entries with a score above 1e-20 are selected. If there are none, no entry is critical
(in Fling: all). Overlaps are compared with a tolerance of 1e-12, so that rounding splits no ties.
PFLlib resets critical entries to the initial weights after round 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, LocalTraining, Mix, Phase, Step, Upload, Variables, Visit
from ..components.averaging import Weighting
from ..components.critical import critical_mask
from ..components.similarity import squared_distances
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, split
from ..models.network import Model

_OWN = method_leaf_name("own")
_CRITICAL = method_leaf_name("critical")


@dataclass(frozen=True)
class FedCAC(Weighting):
    """``own.<leaf>`` is the mix over C_i, ``critical.<leaf>`` is m_i."""

    # [share of a tensor] critical entries; default: Fling's for CIFAR-10 (CIFAR-100: 0.4)
    tau: float = 0.5
    # [rounds] time in which the threshold rises; default: Fling's for CIFAR-10 (CIFAR-100: 170)
    beta: float = 100
    # running statistics stay on the client or are averaged; default: the official code (Fling)
    bn_stats: Literal["local", "mean"] = "local"

    def __post_init__(self) -> None:
        bounded(self, tau="[0, 1]", beta="(0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        w = {n: v for n, v in model.initial.items() if model.role(n) != "stats"}
        masks = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in w.items()}
        local_stats, shared = split(
            model.initial, lambda leaf: self.bn_stats == "local" and leaf not in w
        )
        return Variables(shared, local_stats | add_prefix(w, _OWN) | add_prefix(masks, _CRITICAL))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def combine(start: Variables, now: Variables, data: Batch) -> Variables:
            w = self.client_model(model, now)
            return now._replace(shared={n: w[n] for n in w if n in now.shared})

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            # ``combine`` has already combined the mean and the mix
            w = Algorithm.client_model(self, model, now)
            return model.loss(model(w, batch.x), batch)

        def mark_critical(start: Variables, now: Variables, data: Batch) -> Variables:
            w = {n: now.shared[n] for n in select_prefix(now.personal, _OWN)}
            masks = {n: critical_mask(start.shared[n], v, self.tau) for n, v in w.items()}
            own = add_prefix(w, _OWN) | add_prefix(masks, _CRITICAL)
            return now._replace(personal=now.personal | own)

        phase = Phase(train.epochs, (Step(loss, model.leaves.__contains__),))
        return Visit(combine), phase, Visit(mark_critical)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        masks = select_prefix(end.personal, _CRITICAL)
        rows = {_OWN + n: end.shared[n] for n in masks}
        key = torch.cat([m.flatten() for m in masks.values()])
        return Upload(end.shared, mix=Mix(rows, key))

    def mix(self, gram: Tensor, extra: Tensor, round_: int) -> Tensor:
        overlap = 1 - squared_distances(gram) / (2 * gram.diagonal().clamp(min=1))[:, None]
        pairs = overlap[~torch.eye(len(gram), dtype=torch.bool)]
        threshold = pairs.mean() + (round_ + 1) / self.beta * (pairs.max() - pairs.mean())
        is_similar = (overlap >= threshold - 1e-12).fill_diagonal_(True)
        return is_similar / is_similar.sum(1, keepdim=True).to(gram)

    def client_model(self, model: Model, v: Variables) -> Tree:
        """w_i. Right after training this is the trained model, for ``mark_critical`` has stored
        the trained parameters under ``own.<leaf>``, too.
        """
        m, own = select_prefix(v.personal, _CRITICAL), select_prefix(v.personal, _OWN)
        return super().client_model(model, v) | {
            n: torch.where(m[n], w, v.shared[n]) for n, w in own.items()
        }
