"""Frozen weights in 4 bits a number, by bitsandbytes (QLoRA, Dettmers et al. 2023, section 3)."""

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.extras import extra_imports
from .implicit import ImplicitWeight
from .network import Model

Quantization = Literal["nf4", "fp4"]  # which 16 levels, in the names of bitsandbytes
_BLOCK_SIZE = 64  # numbers that share a scale; QLoRA's choice and the default of bitsandbytes
_PIECE = 2**20  # numbers that are quantized at once, a multiple of the block


class QuantizedWeight(ImplicitWeight):
    """A weight of which each number is one of 16 levels times the largest magnitude of its block.

    A block is 64 numbers, along the inputs of an output. levels: [numel / 2, 1] uint8, two numbers
    a byte; scales: [blocks] float32. With ``input_first`` the weight is [I, O], as in Hugging
    Face's Conv1D; its transpose is quantized. The numbers exist during one product or its gradient.
    """

    levels: Tensor
    scales: Tensor
    quantization: Quantization
    input_first: bool

    @staticmethod
    def __new__(  # type: ignore[override]  # parts instead of a shape alone
        cls,
        levels: Tensor,
        scales: Tensor,
        quantization: Quantization,
        shape: torch.Size,
        dtype: torch.dtype,
        input_first: bool = False,
    ) -> Self:
        """Return the weight; ``dtype`` is the type of its numbers."""
        weight = ImplicitWeight.__new__(cls, shape, dtype, levels.device)
        weight.levels, weight.scales = levels, scales
        weight.quantization, weight.input_first = quantization, input_first
        return weight

    @classmethod
    def of(cls, value: Tensor, quantization: Quantization, input_first: bool = False) -> Self:
        """Return the weight whose numbers are nearest to ``value``, of the same type."""
        pieces = [  # the library holds about 20 bytes for each number of a piece
            _library().quantize_4bit(piece, blocksize=_BLOCK_SIZE, quant_type=quantization)
            for piece in (value.mT if input_first else value).flatten().split(_PIECE)
        ]
        levels = torch.cat([levels for levels, _ in pieces])
        scales = torch.cat([state.absmax for _, state in pieces])
        return cls(levels, scales, quantization, value.shape, value.dtype, input_first)

    def form(self) -> Tensor:
        library = _library()
        # as one row: on a CPU, bitsandbytes 0.50 is wrong for rows that end inside a block
        state = library.QuantState(
            self.scales,
            shape=(1, 2 * len(self.levels)),
            dtype=self.dtype,
            blocksize=_BLOCK_SIZE,
            quant_type=self.quantization,
        )
        numbers = library.dequantize_4bit(self.levels, state).flatten()[: self.numel()]
        return numbers.view(self.shape[::-1]).mT if self.input_first else numbers.view(self.shape)

    def compute_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _Linear.apply(_in_autocast_type(x), bias, self.form, False)

    def compute_addmm(self, bias: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
        return _Linear.apply(_in_autocast_type(alpha * x), beta * bias, self.form, True)

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What is in memory, for digests and sizes."""
        return self.levels, self.scales

    def with_parts(self, levels: Tensor, scales: Tensor) -> Self:
        """Return the same weight with these parts."""
        how = self.quantization, self.shape, self.dtype, self.input_first
        return type(self)(levels, scales, *how)

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # read only, like the parts
        return sum(part.nbytes for part in self.parts)

    def detach(self) -> Self:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the weight on a device if that is the only argument, else its numbers."""
        if kwargs or len(args) != 1 or not isinstance(args[0], str | torch.device):
            return self.form().to(*args, **kwargs)
        return self.with_parts(*(part.to(args[0]) for part in self.parts))

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # nothing changes it


class _Linear(torch.autograd.Function):
    """x W^T + bias, or x W + bias; the gradient forms W again, so that it is not kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, form: Callable[[], Tensor], input_first: bool
    ) -> Tensor:
        W = form().to(x.dtype)
        return F.linear(x, W.mT if input_first else W, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, ctx.form, ctx.input_first = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        W = ctx.form().to(ctx.dtype)
        sums = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad.to(ctx.dtype) @ (W.mT if ctx.input_first else W), sums, None, None


def _in_autocast_type(x: Tensor) -> Tensor:
    """Return x in the type in which autocast computes products, if it is on."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def quantize(model: Model, quantization: Quantization) -> Model:
    """Return ``model`` with the weights of its Linears quantized, and frozen.

    The head stays as it is, and so does a weight in several places (tied). ``model`` itself loses
    the weights one by one, so that a large network is in memory once. Raises ValueError if no
    weight is left, or if bitsandbytes is missing.
    """
    _library()
    tied = {*model.ties.values()}
    names = [
        n
        for n, leaf in model.all_leaves.items()
        if leaf.role == "body" and leaf.is_linear and len(leaf.shape) == 2 and n not in tied
    ]
    if not names:
        raise ValueError("the network has no Linear besides its head; leave it out")
    leaves, values = model.all_leaves, {}
    for n in names:
        value = (model.initial if n in model.initial else model.constants).pop(n)
        if value.dtype.itemsize > 4:
            raise ValueError(
                f"{n} is float64, and only shorter numbers are quantized; leave it out"
            )
        values[n] = QuantizedWeight.of(value, quantization, leaves[n].matrix == "transposed")
    return replace(
        model,
        leaves={n: leaf for n, leaf in model.leaves.items() if n not in values},
        constants=model.constants | values,
        frozen_leaves=model.frozen_leaves | {n: leaves[n] for n in names},
    )


def _library() -> ModuleType:
    """Return the module bitsandbytes.functional; raise ValueError if it is missing."""
    # on some CPUs it recommends a faster product, which is not used here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with extra_imports("bitsandbytes", "4bit"):
        from bitsandbytes import functional
    return functional
