"""Clients with different networks share a small network; the two networks teach each other.

Shen et al., "Federated Mutual Learning", 2020, https://arxiv.org/abs/2006.16765, Algorithm 1.
Client k has its own network F (weights w_k) and a copy of the small network g, the meme (weights
theta):

    theta_k <- theta
    L_local  =  alpha CE(F, y) + (1 - alpha) KL(softmax(g) || softmax(F))
    L_meme   =  beta CE(g, y) + (1 - beta) KL(softmax(F) || softmax(g))
    w_k     <- argmin L_local, theta_k <- argmin L_meme     on the same batches, step by step
    theta   <- (1/K) sum_k theta_k

In each loss the other network is the teacher, a constant. Both steps use the values before either
step. The client's own model is F.

BatchNorm: that of F is the client's own; running statistics of g are averaged. Bytes per client and
round: all leaves of g up, all leaves of g down. Deviations: the authors' code lowers the learning
rate every 10 rounds, and its release has the fork and merge of the meme commented out. HtFLlib also
divides KL by the number of classes, lets both losses train both networks, and clips gradients. A
round's ``train_loss`` is L_local + L_meme.
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
    """Both losses have the form of ``student_loss``."""

    # [1] share of CE in the loss of F; 1: F trains as in Local; default: the authors' code
    alpha: float = 0.5
    # [1] share of CE in the loss of g; 1: g trains as in FedAvg; default: the authors' code
    beta: float = 0.5

    def __post_init__(self) -> None:
        bounded(self, alpha="[0, 1]", beta="[0, 1]")

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            own, meme = self.both_logits(model, now, batch)
            L_local = self.student_loss(self.alpha, own, meme, batch)
            return L_local + self.student_loss(self.beta, meme, own, batch)

        return (Phase(train.epochs, (Step(loss, self.trained_leaves(model)),)),)

    def student_loss(self, share: float, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """share CE(student) + (1 - share) KL(teacher || student), []. Logits: [B, classes]."""
        gap = mean(kl_divergence(teacher.detach(), student), batch)
        return share * cross_entropy(student, batch) + (1 - share) * gap
