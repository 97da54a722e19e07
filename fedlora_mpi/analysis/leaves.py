"""Compute the initial variables of a method, which have the names of a run folder's leaves."""

from dataclasses import replace

import torch

from ..algorithm import Algorithm, Variables
from ..core.seeds import rng
from ..models.network import Model


@torch.no_grad()
def first_variables(algorithm: Algorithm, model: Model, seed: int) -> Variables:
    """Return the method's variables before round 1.

    Callers use only their names. Initial weights on the device "meta" are replaced by zeros.
    """
    return algorithm.init(with_numbers(model), rng(seed, "init"))


def with_numbers(model: Model) -> Model:
    """``model`` with zeros for its initial weights on the device "meta"."""
    values = {n: torch.zeros(v.shape) if v.is_meta else v for n, v in model.initial.items()}
    return replace(model, initial=values)
