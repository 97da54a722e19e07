"""Clients with different networks share a small low-rank adapter; the two train in turn.

Yi et al., "pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning", 2023,
https://arxiv.org/abs/2310.13283. Client k has its own network F with weights w_k. The adapter theta
has the same shape on all clients and sits beside one layer of F (F + theta; see
``components/adapter.py``):

    theta_k <- theta
    w_k     <- argmin (1 - mu) CE(F(x; w_k), y) + mu CE((F + theta)(x), y)
               train.epochs, theta_k held still
    theta_k <- argmin CE((F + theta_k)(x), y)
               adapter_epochs, w_k held still
    theta   <- sum_k (n_k / n) theta_k

The client's own model is F(x; w_k) (``inference: model``) or F + theta_k (``combined``), measured
after local training. ``adapter: alone`` reads F + theta as theta, a small classifier of F's last
features; the combined model is then F + mu theta, with mu <= 0.5.

BatchNorm: all of it is the client's own. Statistics move only with F(x; w_k), in the first phase.
Bytes per client and round: the adapter up and down, 4 r (d + classes) beside a head [classes, d].
Deviations: only the paper's abstract and summaries of the paper were available, not
its full text. UNVERIFIED, and therefore options: which loss mu weighs (``mu_on``), the schedule of
mu, adapter_epochs, the model for inference, the place of the adapter. Defaults follow the code of
a later paper by the authors, pFedES. n_k counts training samples; that code also counts validation
and test samples, and it keeps one optimiser's momentum for all clients and rounds.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from ..algorithm import Batch, LocalTraining, Phase, Step, Variables
from ..components.adapter import AdapterSettings
from ..components.averaging import Absence
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_ADAPTER = method_leaf_name("adapter", ".")  # its factors are A and B


@dataclass(frozen=True)
class PFedLoRA(AdapterSettings, Absence):
    """The shared leaves "adapter.A" and "adapter.B" are theta."""

    evaluate_on = "after_training"
    mu: float = 0.5  # [1] weight of one of the model's two losses; default: pFedES's code
    # the loss that mu weighs, that with the adapter or that without; default: pFedES's code
    mu_on: Literal["combined", "model"] = "combined"
    # linear: mu rises from 0 by 1 / mu_rounds per round, up to mu; default: pFedES's code
    mu_schedule: Literal["constant", "linear"] = "constant"
    # [rounds] time in which mu would rise to 1 (linear); default: all rounds of pFedES's code
    mu_rounds: int = 500
    # [epochs] training of theta_k; default: our choice, for speed (pFedES's code: epochs + 10)
    adapter_epochs: int = 1
    # what predicts, F alone or F + theta_k; default: pFedES's code
    inference: Literal["model", "combined"] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, mu="[0, 1]", mu_rounds="[1, inf)", adapter_epochs="[0, inf)")
        if self.adapter == "alone" and self.mu > 0.5:
            raise ValueError(f"mu = {self.mu}: must be at most 0.5 with adapter = alone")

    def check(self, model: Model, train: LocalTraining) -> None:
        self.adapter_spec.weight_name(model)

    def init(self, model: Model, rng: Generator) -> Variables:
        theta = self.adapter_spec.init(model, rng)
        return Variables(shared=add_prefix(theta, _ADAPTER), personal=model.initial)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        mu = self.mu if self.mu_schedule == "constant" else min(self.mu, round_ / self.mu_rounds)
        mu = mu if self.mu_on == "combined" else 1 - mu

        def model_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            w, z = now.personal, self.adapter_spec.features(model, now.personal, batch.x)
            model_logits = model(w, batch.x) if z is None else model.classify(w, z)
            fit = model.loss(model_logits, batch)
            return (1 - mu) * fit + mu * combined_loss(now, start, batch, z)

        def combined_loss(
            now: Variables, start: Variables, batch: Batch, z: Tensor | None = None
        ) -> Tensor:
            w = model.copy_statistics(now.personal)  # F + theta moves no statistics of F
            theta = select_prefix(now.shared, _ADAPTER)
            return model.loss(self.adapter_spec.logits(model, w, theta, batch.x, z), batch)

        model_step = Step(model_loss, model.leaves.__contains__)
        adapter_step = Step(combined_loss, {_ADAPTER + "A", _ADAPTER + "B"}.__contains__)
        return Phase(train.epochs, (model_step,)), Phase(self.adapter_epochs, (adapter_step,))

    def client_model(self, model: Model, v: Variables) -> Tree:
        if self.inference == "model":
            return v.personal
        if self.adapter == "side":
            raise ValueError("adapter = side: no weights of the network are the combined model")
        theta = select_prefix(v.shared, _ADAPTER)
        if self.adapter == "alone":
            theta["B"] = self.mu * theta["B"]
        return self.adapter_spec.merge(model, v.personal, theta)

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        if self.inference == "combined" and self.adapter == "side":
            return self.adapter_spec.logits(model, v.personal, select_prefix(v.shared, _ADAPTER), x)
        return super().logits(model, v, x)
