"""Copies between the host and the training device.

Copies to and from a GPU use pinned memory, so that the host waits only for data that it needs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(v: Tensor, device: torch.device) -> Tensor:
    """``v`` on ``device``, not copied if it is there.

    The host does not wait for a copy to a GPU.
    """
    if device.type == "cuda" and v.device.type == "cpu":
        return v.pin_memory().to(device, non_blocking=True)
    return v.to(device)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the host. Those of a GPU are copied, with a single wait for all copies; those
    on the device meta have no numbers and stay there.
    """
    copies = [
        torch.empty(v.shape, dtype=v.dtype, pin_memory=True)
        if v.is_cuda
        else v
        if v.is_meta
        else v.cpu()
        for v in tensors
    ]
    pending = [(target, v) for target, v in zip(copies, tensors, strict=True) if v.is_cuda]
    for place, v in pending:
        place.copy_(v, non_blocking=True)
    if pending:
        torch.cuda.current_stream(pending[0][1].device).synchronize()
    return copies
