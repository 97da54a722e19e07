"""Convolutions of a stack as matrix products, one for each client, computed at once.

vmap makes one grouped convolution of the convolutions of a stack. Whether that or a batched product
of patches (im2col) is faster depends on the kernels of the GPU. On a CPU it is slower.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ConvolutionsAsProducts(TorchFunctionMode):
    """Computes two-dimensional convolutions without groups or dilation as products of patches."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.conv2d:
            return _convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d``: x [B, I, H, W], weight [O, I, h, w] -> [B, O, H', W']."""
    if groups != 1 or _pair(dilation) != (1, 1) or isinstance(padding, str) or x.dim() != 4:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    (down, right), (vertical, horizontal) = _pair(stride), _pair(padding)
    (outputs, _, height, width), batch = weight.shape, len(x)
    rows = (x.shape[2] + 2 * vertical - height) // down + 1
    patches = F.unfold(x, (height, width), 1, (vertical, horizontal), (down, right))
    patches = patches.transpose(1, 2).flatten(0, 1)  # [B H' W', I h w]
    y = F.linear(patches, weight.flatten(1), bias)
    return y.reshape(batch, rows, -1, outputs).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[int, int]:
    """A setting of a convolution for both directions."""
    return (value, value) if isinstance(value, int) else (*value, *value)[:2]
