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

    base, dense (or None): [O, I]; A: [r, I]; B: [O, r]. With ``input_first`` the weight is stored
    as [I, O], and so is ``base``, as in Hugging Face's Conv1D. Under vmap, all but ``base`` may
    have a client axis. ``F.linear`` and ``torch.addmm`` with it compute the products of the parts;
    any other function gets the sum. ``base`` has no gradient.
    """

    base: Tensor
    dense: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    input_first: bool

    @staticmethod
    def __new__(
        cls,
        base: Tensor,
        dense: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        input_first: bool = False,
    ) -> "UnmergedWeight":
        """Return the weight; it has the shape and type of ``base``."""
        weight = base.detach().as_subclass(cls)
        weight.base, weight.dense = base.detach(), dense
        weight.A, weight.B, weight.scale, weight.input_first = A, B, scale, input_first
        return weight

    def merge(self) -> Tensor:
        """Return the sum of the parts, in the shape and type of ``base``."""
        update = _plus(self.scale * self.B @ self.A, self.dense)
        return self.base + (update.mT if self.input_first else update).to(self.base.dtype)

    def update_product(self, x: Tensor, by_input: bool) -> Tensor:
        """Return x (W + s B A)^T for x [..., I] if ``by_input``, else x (W + s B A) for x [..., O].

        W is ``dense``; the result has the type of A.
        """
        x = x.to(self.A.dtype)
        if by_input:
            update = self.scale * F.linear(F.linear(x, self.A), self.B)
            return _plus(update, None if self.dense is None else F.linear(x, self.dense))
        update = self.scale * (x @ self.B) @ self.A
        return _plus(update, None if self.dense is None else x @ self.dense)

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
    """Return x W^T + bias of the stored weight W; None if it is none of ours."""
    if not isinstance(weight, UnmergedWeight) or isinstance(x, UnmergedWeight):
        return None
    y = F.linear(x, weight.base, bias)
    return y + weight.update_product(x, not weight.input_first).to(y.dtype)


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """Return beta bias + alpha x W of the stored weight W; None if it is none of ours."""
    if not isinstance(weight, UnmergedWeight) or isinstance(x, UnmergedWeight):
        return None
    y = torch.addmm(bias, x, weight.base, beta=beta, alpha=alpha)
    return y + alpha * weight.update_product(x, weight.input_first).to(y.dtype)


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, torch.addmm: _addmm}
