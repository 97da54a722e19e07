"""What one forward pass does with the weights: which of them make the logits, and which act as
matrices.

The output of every product with a weight (Linear, convolution, ``x @ w``) is cut out of the graph.
A gradient of the logits then reaches the last products on the ways to them and nothing before:
these are the head, wherever the network registers them. Products that it never runs, or whose
outputs it throws away, get no gradient.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..core.seeds import isolated
from .substitutes import Substitutes
from .unwrapping import duplicate

Matrix = Literal["conv", "transposed", "linear", ""]

_PRODUCTS: dict[str, Matrix] = {
    **dict.fromkeys(
        ("linear", "bilinear", "matmul", "mm", "bmm", "mv", "inner", "einsum", "tensordot"),
        "linear",
    ),
    **dict.fromkeys(("__matmul__", "__rmatmul__", "addmm", "addmv", "baddbmm", "addbmm"), "linear"),
    **{f"conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": "transposed" for n in (1, 2, 3)},
}
_LAYERS = {"linear", "bilinear", *(name for name, kind in _PRODUCTS.items() if kind != "linear")}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_BLOCKS = {"multi_head_attention_forward", *(f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
                                             for cell in ("", "_cell"))}  # fmt: skip
PRODUCT_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)  # layers that are one product


class Watched(NamedTuple):
    """``head``: name of the module that makes the logits, "" where none does as a whole;
    ``leaves``: names of all parameters of the head, or of the heads where several products meet in
    the logits; ``matrices``: how a product uses each parameter that enters one.
    """

    head: str
    leaves: frozenset[str]
    matrices: dict[str, Matrix]


@dataclass
class _Product:
    """A product that was met: the parameters in it, the module around it, its output cut from what
    is before.
    """

    parameters: list[str]
    module: str
    output: Tensor
    width: int  # what it makes of an example: numbers, channels


def watch(module: nn.Module, x: Tensor, classes: int) -> Watched:
    """What a copy of ``module`` does in evaluation mode with inputs x; the head in the order of
    registration where the pass cannot be followed.
    """
    module = duplicate(module).eval().requires_grad_(False)
    watching = _Watching(module)
    try:
        with (
            isolated(0, "trial"),
            torch.enable_grad(),
            Substitutes(None, torch.tensor(0)),
            watching,
        ):
            logits = module(x)
        gradients = torch.autograd.grad(
            logits.sum(), [p.output for p in watching.met], allow_unused=True
        )
    except RuntimeError:  # the network forbids gradients, or none of it is a product
        gradients = [None] * len(watching.met)
    last = [
        p
        for p, gradient in zip(watching.met, gradients, strict=True)
        if gradient is not None and (p.parameters or p.module)
    ]
    found = [_owned(module, p) for p in [p for p in last if p.width == classes] or last[-1:]]
    head, leaves = found[-1] if found else _registered(module)
    return Watched(head, frozenset(leaves).union(*(other for _, other in found)), watching.matrices)


class _Watching(TorchFunctionMode):
    """Notes every product with a parameter, and cuts its output from what is before it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.met: list[_Product] = []
        self.matrices: dict[str, Matrix] = {}
        self._running: list[str] = []
        # alive, so that no other tensor takes the place in memory that tells them
        self._held: list[Tensor] = []
        self._name_at: dict[tuple[int, int], str] = {}
        for name, parameter in module.named_parameters():
            self._remember(name, parameter)
        self._own = frozenset(self._name_at)
        for name, part in module.named_modules():
            part.register_forward_pre_hook(lambda part, args, name=name: self._running.append(name))
            part.register_forward_hook(lambda part, args, output: self._leave(), always_call=True)
        self._parts = dict(module.named_modules())

    def _leave(self) -> None:
        self._running.pop()

    def _remember(self, name: str, tensor: Tensor) -> None:
        self._held.append(tensor)
        self._name_at[_place(tensor)] = name

    def _names(self, given: Any) -> list[str]:
        """The parameters among the arguments, as they are, as views, or as something of their shape
        made of them.
        """
        places = [
            _place(v)
            for v in tree_leaves(given)
            if isinstance(v, Tensor) and v.layout is torch.strided
        ]
        return [self._name_at[place] for place in places if place in self._name_at]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if name in _PRODUCTS and isinstance(output, Tensor):
            # not what enters a layer
            weights = (args[1:], kwargs) if name in _LAYERS else (args, kwargs)
            parameters = self._names(weights)
            module = self._running[-1] if self._running and self._is_layer(name) else ""
            if parameters or module:
                self._note(_PRODUCTS[name], weights)
                return self._cut(_PRODUCTS[name], parameters, module, output)
        elif name in _BLOCKS:
            return tree_map(self._cut_block, output)
        else:
            self._follow(name, args, kwargs, output)
        return output

    def _is_layer(self, name: str) -> bool:
        """Whether the product is what the innermost running module is for: a part without parts."""
        part = self._parts[self._running[-1]]
        return (
            isinstance(part, PRODUCT_LAYERS)
            or name in _LAYERS
            and not any(part.children())
            and any(part.parameters())
        )

    def _note(self, kind: Matrix, weights: Any) -> None:
        """How a product uses the parameters that enter it as they are."""
        for tensor in tree_leaves(weights):
            if (
                isinstance(tensor, Tensor)
                and tensor.layout is torch.strided
                and _place(tensor) in self._own
            ):
                self.matrices.setdefault(self._name_at[_place(tensor)], kind)

    def _cut(self, kind: Matrix, parameters: list[str], module: str, output: Tensor) -> Tensor:
        axis = 1 if kind != "linear" and output.dim() > 1 else -1
        channels = output.shape[axis] if output.dim() else 1
        cut = output.detach().requires_grad_(output.is_floating_point())
        self.met.append(_Product(parameters, module, cut, channels))
        return cut.clone()  # which may be written to in place

    def _cut_block(self, output: Any) -> Any:
        """Recurrent and attention layers are no head, but nothing before them is either."""
        floats = isinstance(output, Tensor) and output.is_floating_point()
        return output.detach().clone().requires_grad_().clone() if floats else output

    def _follow(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        """What is made of one parameter and has its shape stands for it; a vector added to a
        product belongs to it.
        """
        if (
            not isinstance(output, Tensor)
            or output.layout is not torch.strided
            or not output.is_floating_point()
        ):
            return
        names = self._names((args, kwargs))
        sources = [
            n
            for n in names
            if self._parameter(n).dim() > 1 and self._parameter(n).shape == output.shape
        ]
        if len(sources) == 1 and _place(output) not in self._name_at:
            self._remember(sources[0], output)
        elif (
            name in _SUMS
            and self.met
            and output.shape == self.met[-1].output.shape
            and not self.met[-1].module
        ):
            self.met[-1].parameters += [n for n in names if self._parameter(n).dim() == 1]

    def _parameter(self, name: str) -> Tensor:
        return self._parts[name.rpartition(".")[0]]._parameters[name.rpartition(".")[2]]


def _place(tensor: Tensor) -> tuple[int, int]:
    """What two tensors have in common that are the same numbers in the same memory."""
    return tensor.untyped_storage().data_ptr(), tensor.numel()


def _owned(module: nn.Module, product: _Product) -> tuple[str, set[str]]:
    """(module whose parameters are all in the product or "", names of the parameters)."""
    owners = {owner_of(name) for name in product.parameters}
    owner = product.module or (owners.pop() if len(owners) == 1 else "")
    part = module.get_submodule(owner)
    own = {f"{owner}.{name}" if owner else name for name, _ in part.named_parameters()}
    whole = (
        bool(owner) and own == set(product.parameters) or product.module and not product.parameters
    )
    if isinstance(part, PRODUCT_LAYERS) or whole:
        return owner, own
    return "", set(product.parameters)


def owner_of(parameter: str) -> str:
    """The module that has a parameter, the parametrized one of what a parametrization is made of."""
    whole, parametrized, _ = parameter.rpartition(".parametrizations.")
    return whole if parametrized else parameter.rpartition(".")[0]


def _registered(module: nn.Module) -> tuple[str, set[str]]:
    """The last Linear, else the last convolution, and its parameters."""
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        names = [name for name, part in module.named_modules() if isinstance(part, kind)]
        if names:
            part = module.get_submodule(names[-1])
            return names[-1], {
                f"{names[-1]}.{n}" if names[-1] else n for n, _ in part.named_parameters()
            }
    return "", set()
