"""LoRA with a fixed factor A, so that the mean of the B factors gives the mean of the products.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA), ICLR 2024,
https://arxiv.org/abs/2403.12313. On the weights W_0 + s B A_0, with one random A_0 for all clients:

    B_k  <-  local training of the server's B, A_0 held still
    B    <-  sum_k p_k B_k,  p_k = n_k / n          sum_k p_k B_k A_0 = B A_0

Ranks per client: client k has the first r_k rows of A_0. Its B is padded with zeros to the largest
rank. BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes norm. Bytes
per client and round: 4 (r_k d_out for each decomposed weight, plus the leaves trained in full) up
and down. In round 1, B = 0 is not sent down. A_0 is never sent, because it follows from a seed.
Deviations: no noise for differential privacy. The head is trained in full and averaged by n_k; in
the paper it keeps its initial value. The bytes of a client that missed rounds are counted as if it
had missed none.
"""

from dataclasses import dataclass

from ..components.lora.one_factor import OneFactor


@dataclass(frozen=True)
class FFALoRA(OneFactor):
    """``OneFactor`` without changes."""
