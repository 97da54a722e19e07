"""LoRA factors averaged one by one, and what their mean misses added to the frozen weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", ACL
2025, https://arxiv.org/abs/2410.09432. On the weights W + s B A, p_k = n_k / n in all three sums:

    A  <-  sum_k p_k A_k      B  <-  sum_k p_k B_k
    R  =   sum_k p_k B_k A_k - B A  =  sum_k p_k (B_k - B)(A_k - A)
    W  <-  W + s R            so that W + s B A is the exact mean of W + s B_k A_k

R has at most the rank (K - 1) r of K clients (the paper: K r): ``downlink: factored`` counts K - 1 pairs of factors for
it, ``dense`` counts it whole.

Ranks of clients' own: a client gets the first r_k components; factors count with zeros up to the largest rank.
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in full) up; the
same and R down, 4 d_out d_in or 4 (K - 1) R (d_out + d_in) each; in round 1 there is no R.
Deviations: the authors' code counts clients equally, and adds R transposed (right for the layers of GPT-2 alone).
"""

from dataclasses import dataclass

from ..finetuning import Calibrated


@dataclass(frozen=True)
class FedExLoRA(Calibrated):
    """``Calibrated`` as it is."""
