"""LoRA whose factor A stays at its first value, so that the mean of B is the mean of the products.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA), ICLR 2024,
https://arxiv.org/abs/2403.12313. On the weights W_0 + s B A_0, with one random A_0 for all clients:

    B_k  <-  local training of the server's B, A_0 held still
    B    <-  sum_k p_k B_k,  p_k = n_k / n          sum_k p_k B_k A_0 = B A_0

Ranks of clients' own: a client has the first r_k rows of A_0, and its B counts with zeros up to the
largest rank. BatchNorm: takes its statistics as they are, unless ``full`` names norm. Bytes per
client and round: 4 (r_k d_out for each decomposed weight, and what is trained in full) up and down;
in round 1 B = 0 does not come down, and A_0 never travels: it follows from a seed. Deviations: no
noise for differential privacy. The head is trained in full and averaged by n_k; the paper's stays
at its first value. A client that missed rounds is counted as if it had followed.
"""

from dataclasses import dataclass

from ..components.lora.one_factor import OneFactor


@dataclass(frozen=True)
class FFALoRA(OneFactor):
    """``OneFactor`` as it is."""
