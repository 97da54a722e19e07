"""LoRA whose factors train in turn, B in one round and A in the next, so that each mean is exact.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (RoLoRA),
NeurIPS 2025, https://arxiv.org/abs/2502.01755. On the weights W_0 + s B A, with p_k = n_k / n:

    rounds 1, 3, ...    B_k  <-  local training, A held still       B  <-  sum_k p_k B_k
    rounds 2, 4, ...    A_k  <-  local training, B held still       A  <-  sum_k p_k A_k

B is first, since it is zero and A would have no gradient. ``schedule: B`` trains B in every round,
as FFA-LoRA.

Ranks of clients' own: a client has the first r_k components, and its factor counts with zeros up to
the largest rank. BatchNorm: takes its statistics as they are, unless ``full`` names norm. Bytes per
client and round: up 4 (r_k d_out or, in even rounds, r_k d_in for each decomposed weight, and what
is trained in full); down the same of the round before, and in round 1 what is trained in full
alone. Deviations: the head is trained in full in all rounds and averaged by n_k. A client that
missed rounds is counted as if it had followed.
"""

from dataclasses import dataclass
from typing import Literal

from ..components.lora.one_factor import OneFactor


@dataclass(frozen=True)
class RoLoRA(OneFactor):
    """The mean is taken of both factors, and that of the one that was held still is dropped."""

    schedule: Literal["alternate", "B"] = "alternate"

    @property
    def factor_schedule(self) -> tuple[Literal["A", "B"], ...]:
        return ("B", "A") if self.schedule == "alternate" else ("B",)
