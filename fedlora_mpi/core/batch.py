"""A mini-batch of one client, and means over its real examples: padding never counts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """A mini-batch of one client."""

    x: Tensor  # [B, ...] images, transformed and normalised, or [B, L] int64 token ids
    # [B] class index, int64; without classes the targets [B, k], float32; of texts that are learned
    # the next tokens [B, L], int64
    y: Tensor
    # [B] False for padding, which is at the end; None when all B examples are real
    real: Tensor | None
    key: Tensor  # [] int64, the address of this step's noise (dropout)
    # [classes] training samples of this client in each class, in this round, float32; without
    # classes [1], all its training samples
    counts: Tensor


def mean(each: Tensor, batch: Batch) -> Tensor:
    """The mean of ``each`` [B] over the real examples, []; values of padding are ignored."""
    if batch.real is None:
        return each.mean()
    return torch.where(batch.real, each, 0).sum() / batch.real.sum()


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over the real examples, []. logits: [B, classes]."""
    if batch.y.dim() > 1:
        raise ValueError(
            "cross_entropy needs class labels, and the targets of this run are others; call "
            "model.loss(outputs, batch)"
        )
    if batch.real is None:
        return F.cross_entropy(logits, batch.y)
    return mean(F.cross_entropy(zero_padding(logits, batch), batch.y, reduction="none"), batch)


def zero_padding(outputs: Tensor, batch: Batch) -> Tensor:
    """The outputs [B, ...] of the network, with zeros for padding.

    Without this an infinite output of padding gives a nan gradient.
    """
    if batch.real is None:
        return outputs
    return torch.where(batch.real.view(-1, *[1] * (outputs.dim() - 1)), outputs, 0)


def one_hot(batch: Batch) -> Tensor:
    """Whether an example has a class, [B, classes] bool; False for padding."""
    is_own = batch.y[:, None] == torch.arange(len(batch.counts), device=batch.y.device)
    return is_own if batch.real is None else is_own & batch.real[:, None]


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each example, [B], for the
    temperature T. Logits: [B, classes].
    """
    q, p = ((logits / temperature).log_softmax(1) for logits in (teacher, student))
    return temperature**2 * (q.exp() * (q - p)).sum(1)  # F.kl_div has no rule for vmap


def split_batch(batch: Batch) -> tuple[Batch, Batch]:
    """The examples at even positions and those at odd positions, as two batches.

    If there is only one example, it is in both. Padding stays at the end. The halves draw different
    noise.
    """
    first, second = (
        Batch(
            batch.x[offset::2],
            batch.y[offset::2],
            None if batch.real is None else batch.real[offset::2],
            batch.key + offset,
            batch.counts,
        )
        for offset in (0, 1)
    )
    if len(batch.y) == 1:
        return first, first._replace(key=second.key)
    if batch.real is None:
        return first, second
    assert first.real is not None and second.real is not None
    has_one_example, width = ~batch.real[1], len(second.y)
    pairs = (first.x, second.x), (first.y, second.y), (first.real, second.real)
    x, y, real = (torch.where(has_one_example, a[:width], b) for a, b in pairs)
    return first, second._replace(x=x, y=y, real=real)
