"""Every client trains its own model alone; nothing is sent.

This is the lower bound of every comparison: FedLoRA with nothing shared. All clients start from the
same weights:

    w_k  <-  argmin L_k(w_k)

BatchNorm: statistics are the client's own. Bytes per client and round: none.
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import Algorithm, Variables
from ..models.network import Model


@dataclass(frozen=True)
class Local(Algorithm):
    """No hyper-parameters beyond those of ``train``."""

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared={}, personal=model.initial)
