"""LoRA factors averaged one by one; the error of their product is added to the frozen weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models", ACL 2025, https://arxiv.org/abs/2410.09432. The weights are W_0 + W + s B A, with
W = 0 at the start:

    A_k, B_k  <-  local training of the server's A, B
    A  <-  sum_k p_k A_k      B  <-  sum_k p_k B_k      p_k = n_k / n
    W  <-  W + R              R  =  sum_k p_k s B_k A_k - s B A  =  sum_k p_k s (B_k - B) (A_k - A)

The new W + s B A equals the mean of the clients' W + s B_k A_k. Without R the method is FedIT. R is
zero for one client, or if all B_k or all A_k are equal.

R of k clients has at most rank (k - 1) r, since its left factors sum to zero (the paper says k r).
``downlink`` is how R is sent: as a matrix (dense, as in the authors' code), or as k - 1 pairs of
factors (factored).

BatchNorm: uses the stored statistics unchanged, unless ``full`` names norm.

Bytes per client and round: up 4 (r_k (d_out + d_in) for each decomposed weight, and what is trained
in full). Down the same and, from round 2 on, R: 4 d_out d_in for each weight, or 4 (k - 1) r (d_out
+ d_in) after a round of k clients. A client that was absent would need R of all rounds that it
missed; only the last R is counted.

Deviations: the authors' mean is uniform; here all three sums weight clients by samples. The authors
add R transposed, which is right for GPT-2's layers and wrong for a Linear. Their clients have one
rank; here a client of rank r_k gets the first r_k components. Its factors are padded with zeros up
to the largest rank r; its product needs no padding.
"""

from dataclasses import dataclass

from ..components.lora.calibrated import CalibratedTuning


@dataclass(frozen=True)
class FedExLoRA(CalibratedTuning):
    """``CalibratedTuning`` as it is."""
