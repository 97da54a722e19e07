"""A weight W_0 + W + s B A that is never formed: products with it are computed part by part.

A matrix of the weight's size is then neither held for each client nor part of a gradient.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .implicit import ImplicitWeight


class UnmergedWeight(ImplicitWeight):
    """The weight ``base`` + ``dense`` + scale B A, of two axes.

    base, dense (or None): [O, I]; A: [r, I]; B: [O, r]. With ``input_first`` the weight is stored
    as [I, O], and so is ``base``, as in Hugging Face's Conv1D. Under vmap, all but ``base`` may
    have a client axis. ``base`` has no gradient.
    """

    base: Tensor
    dense: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    input_first: bool

    @staticmethod
    def __new__(  # type: ignore[override]  # parts instead of a shape
        cls,
        base: Tensor,
        dense: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        input_first: bool = False,
    ) -> Self:
        """Return the weight; it has the shape and type of ``base``."""
        weight = ImplicitWeight.__new__(cls, base.shape, base.dtype, base.device)
        weight.base, weight.dense = base.detach(), dense
        weight.A, weight.B, weight.scale, weight.input_first = A, B, scale, input_first
        return weight

    def form(self) -> Tensor:
        """Return the sum of the parts, in the shape and type of ``base``."""
        update = _plus(self.scale * self.B @ self.A, self.dense)
        return self.base + (update.mT if self.input_first else update).to(self.base.dtype)

    def compute_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, self.base, bias)
        return y + self.update_product(x, not self.input_first).to(y.dtype)

    def compute_addmm(self, bias: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
        y = torch.addmm(bias, x, self.base, beta=beta, alpha=alpha)
        return y + alpha * self.update_product(x, self.input_first).to(y.dtype)

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


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y
