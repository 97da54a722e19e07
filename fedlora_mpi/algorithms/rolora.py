"""LoRA that trains B in one round and A in the next, so that each mean of factors is exact.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (RoLoRA),
NeurIPS 2025, https://arxiv.org/abs/2502.01755. On the weights W_0 + s B A, with p_k = n_k / n:

    rounds 1, 3, ...    B_k  <-  local training, A held still       B  <-  sum_k p_k B_k
    rounds 2, 4, ...    A_k  <-  local training, B held still       A  <-  sum_k p_k A_k

B trains first: it starts at zero, so A would have no gradient. ``schedule: B`` trains B in every
round, as FFA-LoRA does.

Ranks per client: client k has the first r_k components. Its factor is padded with zeros to the
largest rank. BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes
norm. Bytes per client and round: up 4 (r_k d_out, in even rounds r_k d_in, for each decomposed
weight, plus the leaves trained in full). Down is the same with the factor of the round before; in
round 1 only the leaves trained in full. Deviations: the head is trained in full in all rounds and
averaged by n_k. The bytes of a client that missed rounds are counted as if it had missed none.
"""

from dataclasses import dataclass
from typing import Literal

from ..components.lora.one_factor import OneFactor


@dataclass(frozen=True)
class RoLoRA(OneFactor):
    """The mean covers both factors; the server drops the mean of the factor that did not train."""

    # the factor that trains: B and A by turns, or B alone, as in FFA-LoRA; default: the paper's
    schedule: Literal["alternate", "B"] = "alternate"

    @property
    def factor_schedule(self) -> tuple[Literal["A", "B"], ...]:
        return ("B", "A") if self.schedule == "alternate" else ("B",)
