"""Max pooling of a stack of clients on a CPU, where torch's own takes longer than a convolution.

A stack is pooled in the default layout, whose CPU kernel looks at one number after another;
comparing whole rows of the images does the same in vectors. Of small images Python takes more than
that gives, unless a compiler fuses it all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# numbers of one client from which it pays: 28x28 images gain, 8x8 lose (benchmarks/cross_device.py)
LARGE = 2**15


class Pooling(TorchFunctionMode):
    """Inside it, 2x2 max pools without padding or overlap of images with even sides are ``Halved``;
    of at least so many numbers of one client.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self._least = least

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.max_pool2d and args[0].numel() >= self._least and _halves(*args, **kwargs):
            return Halved.apply(args[0])[0]
        return func(*args, **kwargs)


class Halved(torch.autograd.Function):
    """``F.max_pool2d(x, 2)`` of x [..., H, W], H and W even: the same maxima and gradients; of
    equal numbers the first, row by row, has the gradient. Twice differentiable.
    """

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return Halved.apply(x.movedim(in_dims[0], 0)), (0, 0, 0)

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.unflatten(-2, (-1, 2))
        tall = torch.maximum(rows[..., 0, :], rows[..., 1, :])
        upper = rows[..., 0, :] == tall
        left, right = tall.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.maximum(left, right)
        above = upper.unflatten(-1, (-1, 2))  # of two equal columns the one with the upper maximum
        return y, upper, (left == y) & ((right != y) | (above[..., 0] >= above[..., 1]))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, *masks = output
        ctx.mark_non_differentiable(*masks)
        ctx.save_for_backward(*masks)

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> Tensor:
        upper, left = ctx.saved_tensors
        return _apart(_apart(grad, left, -1), upper, -2)


def _apart(grad: Tensor, first: Tensor, dim: int) -> Tensor:
    """``grad`` along ``dim`` at the first of every two places where ``first`` says so, else at the
    second.
    """
    given = grad * first  # a product: torch.where takes four times as long
    return torch.stack([given, grad - given], dim).flatten(dim - 1, dim)


def _halves(
    x, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> bool:
    def both(value, wanted):
        return value in (wanted, (wanted, wanted), [wanted, wanted])

    plain = (
        both(kernel_size, 2)
        and (stride is None or both(stride, 2))
        and both(padding, 0)
        and both(dilation, 1)
    )
    return (
        plain
        and not ceil_mode
        and not return_indices
        and x.shape[-1] % 2 == 0
        and x.shape[-2] % 2 == 0
    )
