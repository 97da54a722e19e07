"""LoRA factors averaged one by one; the error of their product is added to the frozen weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models", ACL 2025, https://arxiv.org/abs/2410.09432. On the weights W_0 + W + s B A, W = 0
at the start:

    A_k, B_k  <-  local training of the server's A, B
    A  <-  sum_k p_k A_k      B  <-  sum_k p_k B_k      p_k = n_k / n
    W  <-  W + R              R  =  sum_k p_k s B_k A_k - s B A  =  sum_k p_k s (B_k - B) (A_k - A)

W + s B A is then what the clients' W + s B_k A_k are in the mean. Without R it is FedIT; of one
client, or where all B_k or all A_k are equal, R is zero.

R has at most rank (k - 1) r from k clients, since its left factors add up to zero (the paper says k
r). ``downlink``: R travels as a matrix (dense, as in the authors' code), or as k - 1 pairs of
factors (factored). BatchNorm: takes its statistics as they are, unless ``full`` names norm. Bytes
per client and round: 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained in full)
up and down, and down, from round 2 on, R: 4 d_out d_in for each weight, or 4 (k - 1) r (d_out +
d_in) after a round of k clients. Deviations: the authors' mean is uniform, here it is by samples in
all three sums. They add R transposed, which is right for GPT-2's layers and wrong for a Linear.
Their clients have one rank; here a client of rank r_k gets the first r_k components, its factors
count with zeros up to the largest rank r, its product as it is. A client that was absent would need
R of all rounds since; counted is the last.
"""

from dataclasses import dataclass

from ..components.lora.calibrated import CalibratedTuning


@dataclass(frozen=True)
class FedExLoRA(CalibratedTuning):
    """``CalibratedTuning`` as it is."""
