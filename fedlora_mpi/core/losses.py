"""The loss of a run: what the outputs of a network are compared with, and how."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch, cross_entropy, mean, zero_padding
from .user_code import describe_error, import_object

# classes: a class index of each sample; labels: k values of each, 0 or 1; numbers: k real numbers;
# tokens: the next token id at each of L positions of a text, or ``IGNORED``
Targets = Literal["classes", "labels", "numbers", "tokens"]
IGNORED = -100  # a position without a target: padding, or a prompt


@dataclass(frozen=True)
class Loss:
    """``loss(outputs, batch)`` is the mean over the real examples of a batch, [].

    name: as in ``model.loss``.
    targets: what ``each`` compares the outputs with; None before the data of a user's own loss are
        known, which takes any.
    each: (outputs [B, k], targets: [B] int64, or [B, k] float32) -> losses [B]; of tokens (outputs
        [B, L, V], targets [B, L] int64) -> the means over the positions of each text.
    """

    name: str
    targets: Targets | None
    each: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        return mean(self.each(zero_padding(outputs, batch), batch.y), batch)

    def zero_targets(self, samples: int, outputs: int, length: int = 0) -> Tensor:
        """Targets without information, for a trial: [samples] or [samples, outputs]; of tokens
        [samples, length].
        """
        if self.targets == "classes":
            return torch.zeros(samples, dtype=torch.int64)
        if self.targets == "tokens":
            return torch.zeros(samples, length, dtype=torch.int64)
        return torch.zeros(samples, outputs)

    def for_data(self, targets: Targets, outputs: int) -> "Loss":
        """The same loss for data with these targets and so many outputs of the network.

        Raises ValueError if a user's function does not give a loss for each sample.
        """
        loss = replace(self, targets=targets)
        if self.name in LOSSES:
            return loss
        try:
            each = self.each(torch.zeros(3, outputs), loss.zero_targets(3, outputs))
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"loss = {self.name}: fails: {describe_error(error)}") from error
        if not isinstance(each, Tensor) or each.shape != (3,):
            shape = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                f"loss = {self.name}: gives {shape} for 3 samples, not [3]; return one loss for "
                "each sample (reduction='none', and a mean over the outputs of a sample)"
            )
        return loss


@dataclass(frozen=True)
class _CrossEntropy(Loss):
    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(outputs, batch)


@dataclass(frozen=True)
class _NextToken(Loss):
    """Cross-entropy of the next token. Each position counts the same, whatever text it is of."""

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        each, counts = token_losses(zero_padding(outputs, batch), batch.y)
        if batch.real is not None:
            each, counts = (torch.where(batch.real, v, 0) for v in (each, counts))
        return each.sum() / counts.sum().clamp(min=1)


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and number, of the positions of each text that have a target.

    logits: [B, L, V], targets: [B, L]; both results are [B] in the type of the logits.
    """
    has_target = targets != IGNORED
    chosen = logits.gather(-1, torch.where(has_target, targets, 0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(has_target, logits.logsumexp(-1) - chosen, 0)
    return losses.sum(-1), has_target.sum(-1).to(losses.dtype)


def _mean_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    total, count = token_losses(logits, targets)
    return total / count.clamp(min=1)


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _binary_cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")
    return each.mean(1)


def _squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


CROSS_ENTROPY = _CrossEntropy("cross_entropy", "classes", _cross_entropies)
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        CROSS_ENTROPY,
        Loss("bce", "labels", _binary_cross_entropies),
        Loss("mse", "numbers", _squared_errors),
        _NextToken("next_token", "tokens", _mean_token_losses),
    )
}


def find_loss(name: str) -> Loss:
    """The loss of this name, or the function ``module:function`` of the user.

    Raises ValueError if it cannot be imported.
    """
    if name in LOSSES:
        return LOSSES[name]
    try:
        return Loss(name, None, import_object(name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss = {name}: cannot be imported: {error}") from error
