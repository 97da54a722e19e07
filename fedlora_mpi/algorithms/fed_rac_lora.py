"""A chain of LoRA updates: each round samples one factor, freezes it, and merges the product.

Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework
for Low-Rank Adaptation" (RAC-LoRA, Fed-RAC-LoRA), 2024, https://arxiv.org/abs/2410.08305. The
weights are W_0 + W + s B A. In round t all clients use the same sketch:

    right sketch, ``factor: A``   A ~ D    B_k  <-  local training from 0    B  =  sum_k p_k B_k
    left sketch, ``factor: B``    B ~ D    A_k  <-  local training from 0    A  =  sum_k p_k A_k
    W  <-  W + s B A = W + sum_k p_k s B_k A_k,   p_k = n_k / n

With the left sketch, a step of exact gradient descent on A is W <- W - s^2 lr B B' grad. So the
rank of W grows by up to R in every round, whereas the update of FFA-LoRA never exceeds rank R.
Each round redraws the values of the frozen factor, as the paper does. A change of the frozen side,
at random or by turns (``factor: both``: right, then left), is a generalisation of ours.

The entries of D are independent, with mean 0 and variance 1 / (3 d), where d is d_in for A and
d_out for B. They are uniform (``sketch: uniform``, as A starts in the other LoRA methods) or
gaussian. If clients have different ranks, a client has the first r_k components, and its factor is
padded with zeros up to the largest rank R.

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm. Bytes per client and
round: up 4 (r_k d_out or, with a left sketch, r_k d_in for each decomposed weight, and what is
trained in full). Down 4 times the sum of R d_out or R d_in for each decomposed weight (the factor
of the round before with all R components, from which every client updates its W; nothing in round
1), what is trained in full, and one number for the sketch. A client that missed rounds counts as if
it had received their updates.

Deviations: the federated algorithm is known from reviews only: one sketch for all clients, local
epochs, mean, merge. The paper leaves D open. The head is trained in full and averaged by n_k.
"""

from dataclasses import dataclass
from math import pi
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Variables
from ..components.lora.one_factor import OneFactor
from ..core.names import display_name, factor_name, is_factor, method_leaf_name
from ..core.seeds import derive_key, uniform
from ..core.tree import Tree, tmap
from ..models.network import Model

_SEED = method_leaf_name("turn", "seed")


@dataclass(frozen=True)
class FedRACLoRA(OneFactor):
    """Further shared leaves: "<weight>.W", and "turn.seed", from which all sketches are derived."""

    # not a setting: one factor is zero between rounds, so client and server models are equal
    judged: ClassVar = "client"  # type: ignore[misc]
    # the factor that is a sketch and held still; both: by turns; default: our choice of the paper's
    # two sketches, for FFA-LoRA also holds A still
    factor: Literal["A", "B", "both"] = "A"
    # distribution of a sketch's entries; default: our choice, as A starts in the other LoRA methods
    # (the paper leaves it open)
    sketch: Literal["uniform", "gaussian"] = "uniform"

    @property
    def factor_schedule(self) -> tuple[Literal["A", "B"], ...]:
        schedules: dict[str, tuple[Literal["A", "B"], ...]]
        schedules = {"A": ("B",), "B": ("A",), "both": ("B", "A")}
        return schedules[self.factor]

    def init(self, model: Model, rng: Generator) -> Variables:
        shared, personal = super().init(model, rng)[:2]
        # below 2^24, so float32 holds it exactly
        seed = torch.randint(2**24, (), generator=rng).float()
        shared |= self.start_updates(model) | {_SEED: seed}
        return Variables(shared | self.start_factors(shared, 0), personal)

    def received_numel(self, server: Tree, shared: Tree, round_: int) -> int:
        return self.trained_numel(shared, round_ - 1) + 1

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        trained = super().merge_terms(shared, terms, round_)
        # in float64, so that a server without a GPU rounds to the same bits as GPU workers
        updates = self.delta(tmap(Tensor.double, shared | trained))
        dtypes = {n: shared[factor_name(n, "W")].dtype for n in updates}
        merged = {factor_name(n, "W"): d.to(dtypes[n]) for n, d in updates.items()}
        return merged | self.start_factors(shared, round_ + 1)

    def start_factors(self, shared: Tree, round_: int) -> Tree:
        """The factors at the start of round ``round_``: one is zero; the other depends only on the
        seed, the round and the weight's name.
        """
        seed, zero = int(shared[_SEED]), self.active_factor(round_)

        def new_sketch(n, v):
            number = derive_key(seed, "sketch", round_, display_name(n))
            return self.draw_sketch(number, v.shape).to(v)

        return {
            n: torch.zeros_like(v) if is_factor(n, zero) else new_sketch(n, v)
            for n, v in shared.items()
            if is_factor(n)
        }

    def draw_sketch(self, number: int, shape: tuple[int, ...]) -> Tensor:
        """A sketch, [r, d] or [d, r] with r <= d. It is drawn on the CPU, so that clients and
        server have the same bits.
        """
        u, v = uniform(torch.tensor(number), (2, *shape))
        if self.sketch == "uniform":
            return (2 * u - 1) / max(shape) ** 0.5
        # Box-Muller transform
        return (-2 * torch.log(1 - u)).sqrt() * torch.cos(2 * pi * v) / (3 * max(shape)) ** 0.5
