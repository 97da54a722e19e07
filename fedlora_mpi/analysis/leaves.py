"""The initial variables of a method, whose names tell the leaves of a run folder apart."""

from dataclasses import replace

import torch

from ..algorithm import Algorithm, Variables
from ..core.seeds import rng
from ..models.network import Model


@torch.no_grad()
def first_variables(algorithm: Algorithm, model: Model, seed: int) -> Variables:
    """The variables before round 1, of which the names count: where initial weights are gone they
    are zeros.
    """
    values = {n: torch.zeros(v.shape) if v.is_meta else v for n, v in model.initial.items()}
    return algorithm.init(replace(model, initial=values), rng(seed, "init"))
