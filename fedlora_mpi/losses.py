"""Losses of one client's mini-batch; padding never counts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .algorithm import Algorithm, Batch, Loss, Vars
from .models.network import Model
from .models.substitutes import Substitutes


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


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The 1st, 3rd, ... and the 2nd, 4th, ... example; both are the 1st where there is no other.

    Padding, which is at the end, stays at the end. The halves draw different noise.
    """
    first, second = (
        Batch(*(v if v is None else v[at::2] for v in batch[:3]), batch.key + at, batch.counts) for at in (0, 1)
    )
    if len(batch.y) == 1:
        return first, first._replace(key=second.key)
    if batch.real is None:
        return first, second
    one, width = ~batch.real[1], len(second.y)
    x, y, real = (torch.where(one, a[:width], b) for a, b in zip(first[:3], second[:3]))
    return first, second._replace(x=x, y=y, real=real)


def part_loss(algorithm: Algorithm, model: Model) -> Loss:
    """``own_loss`` on a part of a mini-batch, such as one of its ``halves``.

    BatchNorm then normalises by this part alone, where the engine has prepared it for the whole batch.
    """
    own = own_loss(algorithm, model)

    def loss(now: Vars, start: Vars, part: Batch) -> Tensor:
        odd = part.real is not None or len(part.y) == 1  # padded, or too small for BatchNorm
        if not (model.noisy or (odd and model.batch_statistics)):
            return own(now, start, part)
        with Substitutes(part.real, part.key):
            return own(now, start, part)

    return loss
