"""Clients with networks of their own share a small one, and the two learn from each other.

Shen et al., "Federated Mutual Learning", 2020, https://arxiv.org/abs/2006.16765, Algorithm 1.
Client k has the network F (weights w_k) of its own and a copy of the small network g, the meme
(weights theta):

    theta_k <- theta
    L_local  =  alpha CE(F, y) + (1 - alpha) KL(softmax(g) || softmax(F))
    L_meme   =  beta CE(g, y) + (1 - beta) KL(softmax(F) || softmax(g))
    w_k     <- argmin L_local, theta_k <- argmin L_meme     on the same batches, step by step
    theta   <- (1/K) sum_k theta_k

In each loss the other network is a teacher, a constant; both steps start from the values before
them. The client's own model is F.

BatchNorm: that of F is the client's own; running statistics of g are averaged. Bytes per client and
round: all leaves of g up, all leaves of g down. Deviations: the authors' code lowers the learning
rate every 10 rounds, and as released its fork and merge of the meme are commented out. HtFLlib
divides KL by the classes, too, lets both losses train both networks, and clips gradients. A round's
``train_loss`` is L_local + L_meme.
"""

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables
from ..components.companion import Companion
from ..core.batch import cross_entropy, kl_divergence, mean
from ..core.bounds import bounded
from ..models.network import Model


@dataclass(frozen=True)
class FML(Companion):
    """``alpha: 1`` trains F as Local does, ``beta: 1`` g as FedAvg does."""

    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        bounded(self, alpha="[0, 1]", beta="[0, 1]")

    def phases(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            own_logits, meme_logits = self.both_logits(model, now, batch)
            return self.student_loss(
                self.alpha, own_logits, meme_logits, batch
            ) + self.student_loss(self.beta, meme_logits, own_logits, batch)

        return (Phase(train.epochs, (Step(loss, self.trained_leaves(model)),)),)

    def student_loss(self, share: float, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """share CE(student) + (1 - share) KL(teacher || student), []. Logits: [B, classes]."""
        gap = mean(kl_divergence(teacher.detach(), student), batch)
        return share * cross_entropy(student, batch) + (1 - share) * gap
