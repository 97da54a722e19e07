"""The entries of a tensor that training has changed most, relative to their size."""

import torch
from torch import Tensor


def critical_mask(start: Tensor, end: Tensor, tau: float) -> Tensor:
    """The mask m: True where |(w - w0) w| is among the floor(tau size) largest of the tensor."""
    score, count = ((end - start) * end).abs(), int(tau * end.numel() + 1e-9)
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.flatten().topk(count).values[-1]
    threshold = torch.where(
        threshold > 1e-10, threshold, torch.where(score > 1e-20, score, torch.inf).min()
    )
    return score >= threshold
