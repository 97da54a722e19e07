"""Fast max pooling for a stack of clients on a CPU.

torch's own max pooling of a stack takes longer than a convolution: it uses the default layout,
whose CPU kernel reads one number after another. Comparing whole rows of the images gives the same
result with vector operations. For small images Python's overhead is larger than the gain, unless a
compiler fuses the operations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Numbers per client above which it is faster: 28x28 images gain, 8x8 lose
# (benchmarks/cross_device.py).
LARGE_NUMEL = 2**15


class MaxPoolMode(TorchFunctionMode):
    """Context in which ``MaxPool2x2`` replaces 2x2 max pools without padding or overlap.

    It does so if a client's images have even sides and at least ``min_numel`` numbers.
    """

    def __init__(self, min_numel: int = 0) -> None:
        super().__init__()
        self._min_numel = min_numel

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is F.max_pool2d
            and args[0].numel() >= self._min_numel
            and _is_2x2_pool(*args, **kwargs)
        ):
            return MaxPool2x2.apply(args[0])[0]
        return func(*args, **kwargs)


class MaxPool2x2(torch.autograd.Function):
    """Computes ``F.max_pool2d(x, 2)`` of x [..., H, W] with even H and W; twice differentiable.

    Maxima and gradients are the same: among equal numbers the first, row by row, gets the gradient.
    """

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return MaxPool2x2.apply(x.movedim(in_dims[0], 0)), (0, 0, 0)

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.unflatten(-2, (-1, 2))
        row_max = torch.maximum(rows[..., 0, :], rows[..., 1, :])
        upper_wins = rows[..., 0, :] == row_max
        left, right = row_max.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.maximum(left, right)
        # if two columns are equal, the one with its maximum in the upper row wins, else the left
        upper_columns = upper_wins.unflatten(-1, (-1, 2))
        return (
            y,
            upper_wins,
            (left == y) & ((right != y) | (upper_columns[..., 0] >= upper_columns[..., 1])),
        )

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, *masks = output
        ctx.mark_non_differentiable(*masks)
        ctx.save_for_backward(*masks)

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> Tensor:
        upper, left = ctx.saved_tensors
        return _route_gradient(_route_gradient(grad, left, -1), upper, -2)


def _route_gradient(grad: Tensor, is_first: Tensor, dim: int) -> Tensor:
    """Return ``grad`` expanded along ``dim``.

    It goes to the first of two places where ``is_first`` is True, else to the second.
    """
    first_grad = grad * is_first  # a product: torch.where takes four times as long
    return torch.stack([first_grad, grad - first_grad], dim).flatten(dim - 1, dim)


def _is_2x2_pool(
    x, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> bool:
    def equals_both(value, wanted):
        return value in (wanted, (wanted, wanted), [wanted, wanted])

    is_2x2 = (
        equals_both(kernel_size, 2)
        and (stride is None or equals_both(stride, 2))
        and equals_both(padding, 0)
        and equals_both(dilation, 1)
    )
    return (
        is_2x2
        and not ceil_mode
        and not return_indices
        and x.shape[-1] % 2 == 0
        and x.shape[-2] % 2 == 0
    )
