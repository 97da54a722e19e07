"""Forward passes of training in bfloat16: torch's autocast, and what it does not reach.

Products with weights and their gradients are computed in bfloat16 and summed up in float32. The
weights themselves, their gradients, momenta, losses and the statistics of BatchNorm are float32.
"""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def bfloat16_forward(device: torch.device, stacked: bool) -> AbstractContextManager:
    """The context of a forward pass in bfloat16 on ``device``."""
    contexts = ExitStack()
    contexts.enter_context(torch.autocast(device.type, torch.bfloat16, cache_enabled=False))
    contexts.enter_context(Bfloat16Layers(device.type, stacked))
    return contexts


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16; without them it is slower."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class Bfloat16Layers(TorchFunctionMode):
    """Convolutions and BatchNorm inside ``torch.autocast``, the same in a stack and out of it.

    In a stack, autocast on a CPU leaves convolutions in float32, and on a GPU it gives BatchNorm
    an input in bfloat16 beside statistics in float32, which vmap cannot compute.
    """

    def __init__(self, device_type: str, stacked: bool) -> None:
        super().__init__()
        self._on_cpu, self._stacked = device_type == "cpu", stacked

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            return self._convolution(func, *args, **kwargs)
        if func in _TRANSPOSED and self._on_cpu:
            return _in_float32(func, *args, **kwargs)
        if func is F.batch_norm and self._stacked:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _convolution(
        self,
        func: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        rest = stride, padding, dilation, groups
        if self._on_cpu and _exceeds_input(x, weight, dilation):
            return _in_float32(func, x, weight, bias, *rest)
        half = (None if v is None else v.bfloat16() for v in (x, weight, bias))
        return func(*half, *rest)


def _exceeds_input(x: Tensor, weight: Tensor, dilation: Any) -> bool:
    """Whether a kernel is longer than its input in some direction.

    The gradients of such kernels in bfloat16 are wrong in torch 2.13 on a CPU: with a stride above
    1 some numbers are never written, and some dilations end the process.
    """
    axes = weight.shape[2:]
    steps = dilation if isinstance(dilation, tuple | list) else (dilation,) * len(axes)
    lengths = (1 + step * (size - 1) for size, step in zip(axes, steps, strict=True))
    return any(n < length for n, length in zip(x.shape[-len(axes) :], lengths, strict=True))


def _in_float32(
    func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **how: Any
) -> Tensor:
    """``func`` in float32 on a CPU; the result is bfloat16, as that of other layers."""
    with torch.autocast("cpu", enabled=False):
        return func(
            x.float(), weight.float(), None if bias is None else bias.float(), *rest, **how
        ).bfloat16()


def _batch_norm(x: Tensor, *rest: Any, **how: Any) -> Tensor:
    """BatchNorm of ``x`` in float32; the result has the type of ``x``."""
    return F.batch_norm(x.float(), *rest, **how).to(x.dtype)
