"""All clients share one model: the mean of their trained models.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, https://arxiv.org/abs/1602.05629, Algorithm 1:

    w  <-  sum_k (n_k / n) w_k

BatchNorm: running statistics are averaged like every other leaf.

Bytes per client and round: all leaves up, all leaves down.
"""

from dataclasses import dataclass

from ..components.averaging import Averaging


@dataclass(frozen=True)
class FedAvg(Averaging):
    """``weights: uniform`` gives every client of the cohort the same weight."""
