"""A weight whose numbers are not in memory: layers get its products, other functions its numbers.

Layers need no change, since the weight is a tensor that computes its own products.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

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
    Tensor.element_size,
}


class ImplicitWeight(Tensor):
    """The base of weights [O, I] that compute their own products.

    ``F.linear`` and ``torch.addmm`` call ``compute_linear`` and ``compute_addmm``; any other
    function gets what ``form`` returns. The tensor itself has a shape, a type and a device, but no
    memory.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Self:
        """Return a tensor without memory."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @abstractmethod
    def form(self) -> Tensor:
        """Return the numbers, in the shape and type of the weight."""

    @abstractmethod
    def compute_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias, [..., O], for x [..., I]."""

    @abstractmethod
    def compute_addmm(self, bias: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
        """Return beta bias + alpha x W, [B, I], for x [B, O]."""

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
            lambda v: v.form() if isinstance(v, ImplicitWeight) else v, (args, dict(kwargs))
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> NoReturn:  # type: ignore[override]
        """Called where torch would read numbers that are not there."""
        raise RuntimeError(f"{func} of a weight without memory")


# with torch's names of the arguments, as layers may give them by name
def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Return input W^T + bias; None if ``weight`` is none of ours."""
    if not isinstance(weight, ImplicitWeight) or isinstance(input, ImplicitWeight):
        return None
    return weight.compute_linear(input, bias)


def _addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Tensor | None:
    """Return beta input + alpha mat1 W for W = ``mat2``; None if that is none of ours."""
    if not isinstance(mat2, ImplicitWeight) or isinstance(mat1, ImplicitWeight) or out is not None:
        return None
    return mat2.compute_addmm(input, mat1, beta, alpha)


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, torch.addmm: _addmm}
