"""Each client's own model is the proximal point of a local model; the local models are averaged.

Dinh et al., "Personalized Federated Learning with Moreau Envelopes" (pFedMe), NeurIPS 2020,
https://arxiv.org/abs/2006.08848, eqs. (2), (7) and Algorithm 1. w_i and theta_i both start a round
at the global model x. On each mini-batch, with h_i(theta) = f_i(theta) + (lam / 2) ||theta -
w_i||^2 (7):

    theta_i  <-  theta_i - eta_p grad h_i(theta_i)      ``inner_steps`` times (the paper's K)
    w_i      <-  w_i - eta lam (w_i - theta_i)          the gradient of the Moreau envelope of f_i
    x        <-  (1 - beta) x + beta sum_i (n_i / n) w_i

eta_p is ``inner_lr``, eta ``train.lr``. The client's own model is theta_i after local training.

BatchNorm: w_i and theta_i each have affine parameters. The running statistics are those of theta_i,
the only model that sees data, and are averaged (for every beta). Bytes per client and round: all
leaves up, all leaves down; theta_i stays on the client. Deviations: a client uploads (1 - beta) x +
beta w_i, which gives the same x because the mean is linear. The paper's mean is uniform; the
authors' code weighs by samples, as here. Momentum is refused because both updates are plain SGD.
``train.weight_decay`` applies to theta_i alone, as in the authors' optimiser (0.001). In the
authors' code all users train and a sample of them is averaged; here only the cohort trains. Their
published accuracy is that of w_i, whose parameters overwrite theta_i's (their issue 5); PFLlib's is
that of x. For MNIST they have lam 15, inner_steps 5, inner_lr 0.09, lr 0.005, beta 1. With lr lam
> 1, w_i overshoots theta_i, at lr 0.1 and lam 15 by half of their distance; a hint says so.
"""

from dataclasses import dataclass
from warnings import warn

import torch
from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Sgd, Step, Upload, Variables, Visit
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, sq_dist
from ..models.network import Model

_OWN = method_leaf_name("own")


@dataclass(frozen=True)
class PFedMe(Averaging):
    """Stable only if ``inner_lr * lam`` and ``train.lr * lam`` are below 2; ``check`` enforces
    this.
    """

    evaluate_on = "after_training"
    lam: float = 15.0  # [1] weight of the pull of theta_i; default: the authors' for MNIST
    inner_steps: int = 5  # [steps] steps of theta_i per batch, K; default: the authors' for MNIST
    inner_lr: float = 0.09  # [1] eta_p, lr of theta_i; default: the authors' for MNIST
    beta: float = 1.0  # [1] step of x to the mean; default: the authors' for MNIST

    def __post_init__(self) -> None:
        bounded(self, lam="[0, inf)", inner_steps="[1, inf)", inner_lr="(0, inf)", beta="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        if train.momentum:
            raise ValueError(
                f"name = pfedme: needs train.momentum = 0, not {train.momentum}: both of its "
                "updates are plain SGD"
            )
        for field, lr in (("inner_lr", self.inner_lr), ("train.lr", train.lr)):
            if lr * self.lam >= 2:
                limit = f"2 / {field} = {2 / lr:g}"
                raise ValueError(f"lam = {self.lam}: must be below {limit}, or the pull diverges")
        if (reach := train.lr * self.lam) > 1:
            overshoot = (
                f"w_i overshoots theta_i by {reach - 1:.2g} of their distance; authors: 0.005"
            )
            warn(f"train.lr = {train.lr:g} with lam = {self.lam:g}: {overshoot}", stacklevel=2)

    def init(self, model: Model, rng: Generator) -> Variables:
        theta = {n: v for n, v in model.initial.items() if model.role(n) != "stats"}
        return Variables(shared=model.initial, personal=add_prefix(theta, _OWN))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        base_loss = self.loss(model)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]
        own_parameters = {_OWN + n for n in parameters}

        def start_theta(start: Variables, now: Variables, data: Batch) -> Variables:
            return Variables(now.shared, add_prefix({n: now.shared[n] for n in parameters}, _OWN))

        def penalty(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return self.lam / 2 * sq_dist(self.client_model(model, now), now.shared, parameters)

        def h(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return base_loss(now, start, batch) + penalty(now, start, batch)  # eq. (7)

        inner = Step(
            h,
            own_parameters.__contains__,
            lambda sgd: sgd._replace(lr=self.inner_lr),
            repeat=self.inner_steps,
        )
        outer = Step(penalty, parameters.__contains__, lambda sgd: Sgd(sgd.lr))
        return Visit(start_theta), Phase(train.epochs, (inner, outer))

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        """(1 - beta) x + beta w_i; the running statistics are sent unchanged."""

        def interpolate(n, w):
            return torch.lerp(start.shared[n], w, self.beta) if _OWN + n in end.personal else w

        return Upload(mean={n: interpolate(n, w) for n, w in end.shared.items()})

    def client_model(self, model: Model, v: Variables) -> Tree:
        """theta_i with the running statistics of its training."""
        return v.shared | select_prefix(v.personal, _OWN)
