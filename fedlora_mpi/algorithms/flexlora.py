"""LoRA with one rank per client: products are averaged and redistributed by a truncated SVD.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505. With s_k = alpha / r_k:

    W    <-  sum_k p_k s_k B_k A_k,  p_k = n_k / n       W = U S V'
    B_k  <-  U_r S_r / s_k      A_k  <-  V_r'            r = r_k, all singular values on B

Every round loses the part of W that client k does not receive, sum_{j > r_k} s_j^2.

BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes norm. Bytes per
client and round: 4 (r_k (d_out + d_in) for each decomposed weight, plus the leaves trained in full)
up and down. The server keeps d_out d_in numbers for each decomposed weight. Deviations: the head is
trained in full and averaged by n_k.
"""

from dataclasses import dataclass

from ..components.lora.redistributed import RedistributedTuning


@dataclass(frozen=True)
class FlexLoRA(RedistributedTuning):
    """``RedistributedTuning`` as it is."""
