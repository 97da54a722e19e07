"""Losses of one client's mini-batch; padding never counts."""

import torch.nn.functional as F
from torch import Tensor

from .algorithm import Algorithm, Batch, Loss, Vars
from .models.network import Model


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over the real examples. logits: [B, classes]."""
    if batch.real is None:
        return F.cross_entropy(logits, batch.y)
    each = F.cross_entropy(logits, batch.y, reduction="none")
    return (each * batch.real).sum() / batch.real.sum()


def own_loss(algorithm: Algorithm, model: Model) -> Loss:
    """The cross-entropy of the client's own model: what most phases minimise."""

    def loss(now: Vars, start: Vars, batch: Batch) -> Tensor:
        return cross_entropy(algorithm.logits(model, now, batch.x), batch)

    return loss
