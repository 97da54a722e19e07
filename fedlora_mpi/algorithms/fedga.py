"""FedAvg with a loss that balances the gradients which raise and which lower the logit of a class.

Xiao, Zuo and Wang, "FedGA: Federated Learning with Gradient Alignment for Error Asymmetry
Mitigation", AAAI 2025, https://arxiv.org/abs/2412.16582. A mini-batch has n_c samples of class c.
For a sample of class y with logits z and q = softmax(z), and with t held constant:

    l  =  - sum_k t_k log q_k        t_y = 1,  t_k = q_k (n_y - n_k) / n_y for k != y
    w  <-  mean of w_i

With S = sum_k t_k - 1, the gradient of l in z is a + S q, where a_y = q_y - 1 and a_k = q_k n_k /
n_y for k != y. Summed over a batch, a raises and lowers the logit of class c in the proportion

    EA_c  =  mean of 1 - q_c over samples of c / sum_(k != c) mean of q_c over samples of k,

the asymmetry of its errors: misses over false alarms. With ``variant: exact`` the gradient is a,
and the logged loss is the cross-entropy. If all classes are equally frequent in the batch, l is the
cross-entropy.

BatchNorm: running statistics are averaged like every other leaf. Bytes per client and round: all
leaves up, all leaves down. Deviations: only the abstract and the authors' code could be read. l is
that of the code (``variant: code``); whether the paper's equations mean ``code`` or ``exact`` is
unknown. S q also moves the logits of classes that are not in the batch; under ``exact`` they stay.
The code clips the norm of gradients at 5 for every method; here nothing is clipped.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..algorithm import Batch, Loss, Variables
from ..components.averaging import Averaging
from ..core.batch import cross_entropy, mean, one_hot, zero_padding
from ..models.network import Model


@dataclass(frozen=True)
class FedGA(Averaging):
    """FedAvg with another loss. Counts n_c are those of a mini-batch, so its size matters."""

    needs_class_labels = True
    weights: Literal["samples", "uniform"] = "uniform"  # default: the authors' code
    # gradient of the loss in z: a + S q (code), or a (exact); default: the authors' code
    variant: Literal["code", "exact"] = "code"

    def loss(self, model: Model) -> Loss:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            z = zero_padding(self.logits(model, now, batch.x), batch)
            q, t = z.detach().softmax(1), calibrated_targets(z, batch)
            if self.variant == "code":
                return mean(-(t * z.log_softmax(1)).sum(1), batch)
            linear = mean(((q - t) * z).sum(1), batch)  # its gradient is a
            return cross_entropy(z, batch).detach() + linear - linear.detach()

        return loss


def calibrated_targets(z: Tensor, batch: Batch) -> Tensor:
    """The targets t [B, classes], without a gradient. z: the logits [B, classes]."""
    is_own = one_hot(batch)
    n = is_own.sum(0).to(z)  # [classes]
    n_y = n[batch.y].clamp(min=1)[:, None]  # padding may be of a class without samples
    return torch.where(is_own, 1, z.detach().softmax(1) * (1 - n / n_y))
