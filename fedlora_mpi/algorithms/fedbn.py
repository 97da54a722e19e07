"""One model for all clients but for its normalisation layers, which stay with each client.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
https://arxiv.org/abs/2102.07623, Algorithm 1. For every layer l that does not normalise:

    w_l  <-  (1/N) sum_i w_l_i

BatchNorm: affine parameters and running statistics are the client's own.
Bytes per client and round: all leaves but those of normalisation layers, up and down.
Deviations: layers are told by their type (LayerNorm and GroupNorm count too), not by a "bn" in the
name, which misses a ResNet's ``downsample.1`` in PFLlib and FL-bench.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator

from ..algorithm import Algorithm, Variables
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedBN(Algorithm):
    """``weights: uniform``, as in the paper."""

    weights: Literal["samples", "uniform"] = "uniform"
    absent: Literal["exclude", "stale"] = "exclude"

    def init(self, model: Model, rng: Generator) -> Variables:
        personal, shared = split(model.initial, lambda leaf: model.role(leaf) in ("norm", "stats"))
        return Variables(shared=shared, personal=personal)
