"""LoRA factors of a frozen network, averaged one by one.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644. The weights are W_0 + s B A:

    A_k, B_k  <-  local training of the server's A, B
    A  <-  sum_k p_k A_k      B  <-  sum_k p_k B_k      p_k = n_k / n

The mean of the products is not the product of the means: sum_k p_k B_k A_k - B A = sum_k p_k (B_k -
B)(A_k - A).

If clients have different ranks, a client gets the first r_k components, and its factors are padded
with zeros up to the largest rank. So clients that lack the last components dilute them (FLoRA's
authors compare with FedIT in this form).

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm.

Bytes per client and round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in
full) up and down.

Deviations: the head is trained in full and averaged with the factors; the paper's language model
has none.
"""

from dataclasses import dataclass

from ..components.lora import FineTuning


@dataclass(frozen=True)
class FedIT(FineTuning):
    """``FineTuning`` as it is."""
