"""All clients share one model, except for the normalisation layers, which are personal.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
https://arxiv.org/abs/2102.07623, Algorithm 1. For every layer l that does not normalise:

    w_l  <-  (1/N) sum_i w_l_i

BatchNorm: affine parameters and running statistics are personal.

Bytes per client and round: all leaves but those of normalisation layers, up and down.

Deviations: normalisation layers are recognised by their type (also LayerNorm and GroupNorm). PFLlib
and FL-bench look for "bn" in the name, which misses a ResNet's ``downsample.1``.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator

from ..algorithm import Variables
from ..components.averaging import Averaging
from ..core.tree import split
from ..models.network import Model


@dataclass(frozen=True)
class FedBN(Averaging):
    """FedAvg on all leaves but those of normalisation layers."""

    weights: Literal["samples", "uniform"] = "uniform"  # default: the paper, Algorithm 1

    def init(self, model: Model, rng: Generator) -> Variables:
        personal, shared = split(model.initial, lambda leaf: model.role(leaf) in ("norm", "stats"))
        return Variables(shared=shared, personal=personal)
