"""A weight W_0 + W + s B A that is never formed: products with it are computed part by part.

A matrix of the weight's size is then neither held for each client nor part of a gradient. Layers
need no change, since the weight is a tensor that computes its own products.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

# what torch asks of a tensor besides its numbers
_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf is_cpu is_cuda is_meta is_sparse"
)
_DESCRIPTIONS = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()} | {
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.is_complex,
}


class UnmergedWeight(Tensor):
    """The weight ``base`` + ``dense`` + scale B A, of two axes.

    base, dense (or None): [O, I]; A: [r, I]; B: [O, r]. Under vmap, all but ``base`` may have a
    client axis. ``F.linear`` with it, and ``torch.addmm`` as Hugging Face's Conv1D calls it,
    compute the products of the parts; any other function gets the sum. ``base`` has no gradient.
    """

    base: Tensor
    dense: Tensor | None
    A: Tensor
    B: Tensor
    scale: float

    @staticmethod
    def __new__(
        cls, base: Tensor, dense: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> "UnmergedWeight":
        """Return the weight; it has the shape and type of ``base``."""
        weight = base.detach().as_subclass(cls)
        weight.base, weight.dense = base.detach(), dense
        weight.A, weight.B, weight.scale = A, B, scale
        return weight

    def merge(self) -> Tensor:
        """Return the sum of the parts [O, I], in the type of ``base``."""
        update = self.scale * self.B @ self.A
        return self.base + _plus(update, self.dense).to(self.base.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute ``func`` of arguments of which some are such weights."""
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        product = _PRODUCTS.get(func)
        if product and (result := product(*args, **kwargs)) is not None:
            return result
        args, kwargs = tree_map(
            lambda v: v.merge() if isinstance(v, cls) else v, (args, dict(kwargs))
        )
        return func(*args, **kwargs)


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Return x W^T + bias; None if the weight is none of ours. x: [..., I]."""
    if not isinstance(weight, UnmergedWeight) or isinstance(x, UnmergedWeight):
        return None
    y = F.linear(x, weight.base, bias)
    z = x.to(weight.A.dtype)
    update = weight.scale * F.linear(F.linear(z, weight.A), weight.B)
    update = update if weight.dense is None else update + F.linear(z, weight.dense)
    return y + update.to(y.dtype)


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """Return bias + x W; None if the weight is none of ours. x: [B, O] for W [O, I]."""
    if not isinstance(weight, UnmergedWeight) or isinstance(x, UnmergedWeight):
        return None
    y = torch.addmm(bias, x, weight.base, beta=beta, alpha=alpha)
    z = x.to(weight.A.dtype)
    update = weight.scale * (z @ weight.B) @ weight.A
    return y + alpha * _plus(update, None if weight.dense is None else z @ weight.dense).to(y.dtype)


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, torch.addmm: _addmm}
