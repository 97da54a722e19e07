"""Normalisation layers that a stack of clients can differentiate twice.

torch.func.vmap gives wrong second derivatives of batch, instance and layer normalisation with an
affine part (https://github.com/pytorch/functorch/issues/534; torch 2.13 has the mistake). They are
right if the affine part is a product and a sum of its own.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SecondOrder(TorchFunctionMode):
    """Inside, these layers compute their affine part apart from the normalisation.

    A loss whose gradient is part of a loss runs its passes in it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        separate = _SEPARATE.get(func)
        return (separate or func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    return _scale_channels(y, weight, bias)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    y = F.instance_norm(x, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _scale_channels(y, weight, bias)


def _layer_norm(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scale(F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


def _scale_channels(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``y`` [B, channels, ...] times ``weight`` plus ``bias``, [channels] each."""
    shape = [1, -1] + [1] * (y.dim() - 2)
    return _scale(
        y,
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    )


def _scale(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_SEPARATE: dict[Callable, Callable] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
}
