"""FedAvg over a fading radio channel that adds the clients' signals; high losses have more weight.

Hamidi, Bereyhi, Asaad and Poor, "Over-the-Air Fair Federated Learning via Multi-Objective
Optimization" (OTA-FFL), IEEE Communications Letters 2025, https://arxiv.org/abs/2501.03392. Each of
the K clients of a round first measures the loss f_k of the shared model w on its training samples,
then trains w to w_k. The entries of D_k = w_k - w have the mean m_k and the standard deviation s_k.
The channel h_k ~ CN(0, 1) of a client is new in every round; it sends b_k (D_k - m_k) / s_k:

    lam  =   argmax sum_k lam_k f_k,   lam_k >= 0,  sum_k lam_k = 1,  |lam_k - 1/K| <= epsilon
    b_k  =   lam_k s_k sqrt(c) / h_k
    c    =   min_k |h_k|^2 / (lam_k s_k)^2          the largest c with all powers |b_k|^2 <= 1
    w   <-   w + sum_k lam_k D_k + e                each entry of e ~ N(0, sigma^2 / (2 c))

The server receives the sum of h_k b_k (D_k - m_k) / s_k and noise of variance sigma^2, half of it
in the real part. It divides them by sqrt(c) and adds sum_k lam_k m_k. Between equal losses the
client with the smaller number comes first.

BatchNorm: running statistics are averaged with the weights lam_k, without noise; f_k is measured in
evaluation mode. Bytes per client and round: all leaves, f_k, m_k and s_k up, all leaves down.
Deviations: OTA-FFL-like is a reconstruction. Only the abstract was available: weights by a modified
Chebyshev step, gradients added on the channel, closed forms of the scalars of clients and server.
Unknown are the modification, here the box around equal weights; the closed forms, here those that
invert the channel (zero-forcing); what is sent, here the result of local training; all constants.
f_k, m_k, s_k arrive without error. No weak channel is left out: one deep fade is everybody's noise.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Generator, Tensor

from ..algorithm import (
    Aggregate,
    Algorithm,
    LocalTraining,
    Phase,
    Reports,
    Step,
    Svd,
    Transport,
    Update,
    Upload,
    Variables,
    Visit,
)
from ..components import radio
from ..components.simplex import favour_largest
from ..core.batch import Batch, mean, zero_padding
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, numel, sq_dist
from ..models.network import Model

_LOSS, _MOMENTS = method_leaf_name("own", "loss"), method_leaf_name("own", "moments")


@dataclass(frozen=True)
class OtaFflLike(Algorithm):
    """The personal leaves "own.loss" and "own.moments" hold f_k, and m_k and s_k."""

    weights = "uniform"
    metrics = ("c_star", "effective_snr")
    # [1] largest distance of lam_k from 1 / K, 0: FedAvg; default: our choice, as it is unknown
    epsilon: float = 0.02
    sigma: float = 0.1  # [1] deviation of the noise, for powers of at most 1; default: our choice

    def __post_init__(self) -> None:
        bounded(self, epsilon="[0, inf)", sigma="[0, inf)")

    def init(self, model: Model, rng: Generator) -> Variables:
        own = {_LOSS: torch.zeros(()), _MOMENTS: torch.zeros(2)}
        return Variables(model.initial | radio.draw_seeds(model, rng), own)

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, lambda shared: radio.split_seeds(shared)[1])

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        def measure_loss(start: Variables, now: Variables, data: Batch) -> Variables:
            z = torch.cat([self.logits(model.eval_mode(), now, x) for x in data.x.split(250)])
            f = mean(model.loss.each(zero_padding(z, data), data.y), data)
            return now._replace(personal=now.personal | {_LOSS: f.float()})

        def measure_update(start: Variables, now: Variables, data: Batch) -> Variables:
            moments = radio.update_moments(model, start.shared, now.shared).float()
            return now._replace(personal=now.personal | {_MOMENTS: moments})

        phase = Phase(train.epochs, (Step(self.loss(model), model.leaves.__contains__),))
        return Visit(measure_loss, all_data=True), phase, Visit(measure_update)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        report = torch.cat([end.personal[_LOSS][None], end.personal[_MOMENTS]])
        return Upload(end.shared, report=report)

    def mean_factors(self, reports: Reports, round_: int) -> Tensor:
        return favour_largest(reports.numbers[:, 0], self.epsilon)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        reports, round_, seeds = aggregate.reports, aggregate.round, radio.split_seeds(shared)[0]
        assert reports
        lam = self.mean_factors(reports, round_) / len(reports.clients)
        gains = radio.fading_powers(seeds, reports.clients, round_)
        c = float((gains / (lam * reports.numbers[:, 2]).square()).min())
        deviation = self.sigma / (2 * c) ** 0.5
        e = radio.receiver_noise(seeds, shared, deviation, round_)
        w = {n: v + e[n] if n in e and deviation else v for n, v in aggregate.mean.items()}
        power = float(sq_dist(aggregate.mean, shared, e)) / numel(e)
        snr = power / deviation**2 if deviation else float("nan")
        metrics = {"c_star": c if isfinite(c) else float("nan"), "effective_snr": snr}
        return Update(w | seeds, server, metrics)
