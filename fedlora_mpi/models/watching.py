"""Find out, in one forward pass, which weights are the head and which are used as matrices.

The output of every product with a weight (Linear, convolution, ``x @ w``) is detached from the
graph. A gradient of the logits then reaches only the last products on the paths to the logits.
These are the head, in whatever order the network registers its modules. Products that never run, or
whose outputs are not used, get no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..core.seeds import isolate_rng
from ..core.tree import storage_key
from .substitutes import Substitutes
from .unwrapping import copy_module

Matrix = Literal["conv", "transposed", "linear", ""]

_PRODUCT_OPS: dict[str, Matrix] = {
    **dict.fromkeys(
        ("linear", "bilinear", "matmul", "mm", "bmm", "mv", "inner", "einsum", "tensordot"),
        "linear",
    ),
    **dict.fromkeys(("__matmul__", "__rmatmul__", "addmm", "addmv", "baddbmm", "addbmm"), "linear"),
    **{f"conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": "transposed" for n in (1, 2, 3)},
}
_LAYER_OPS = {
    "linear",
    "bilinear",
    *(name for name, kind in _PRODUCT_OPS.items() if kind != "linear"),
}
_ADD_OPS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_COMPOSITE_OPS = {
    "multi_head_attention_forward",
    *(
        f"{kind}{cell}"
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for cell in ("", "_cell")
    ),
}
PRODUCT_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)  # layers that are one product


class ForwardTrace(NamedTuple):
    """The head and the matrices of a network.

    ``head``: name of the module that makes the logits; "" if no single module does. ``leaves``:
    names of all parameters of the head, or of all heads if several products meet in the logits.
    ``matrices``: how a product uses each parameter that enters one.
    """

    head: str
    leaves: frozenset[str]
    matrices: dict[str, Matrix]


@dataclass
class _Product:
    """A product in the pass: its parameters, the module that runs it, and its detached output."""

    parameters: list[str]
    module: str
    output: Tensor
    width: int  # number of features or channels of its output


def trace_forward(module: nn.Module, x: Tensor, classes: int, share: bool = False) -> ForwardTrace:
    """Return the trace of a copy of ``module`` in evaluation mode on inputs x.

    If the pass cannot be traced, the head is the last registered Linear or convolution. ``share``:
    as in ``copy_module``.
    """
    module = copy_module(module, share).eval().requires_grad_(False)
    trace = _TraceMode(module)
    gradients: Sequence[Tensor | None]
    try:
        with (
            isolate_rng(0, "trial"),
            torch.enable_grad(),
            Substitutes(None, torch.tensor(0)),
            trace,
        ):
            logits = module(x)
        gradients = torch.autograd.grad(
            logits.sum(), [p.output for p in trace.products], allow_unused=True
        )
    except RuntimeError:  # the network forbids gradients, or none of it is a product
        gradients = [None] * len(trace.products)
    final_products = [
        p
        for p, gradient in zip(trace.products, gradients, strict=True)
        if gradient is not None and (p.parameters or p.module)
    ]
    heads = [
        _head_of_product(module, p)
        for p in [p for p in final_products if p.width == classes] or final_products[-1:]
    ]
    head, leaves = heads[-1] if heads else _last_registered(module)
    return ForwardTrace(
        head, frozenset(leaves).union(*(other for _, other in heads)), trace.matrices
    )


def name_head(module: nn.Module, x: Tensor, trace: ForwardTrace, head: str) -> ForwardTrace:
    """Return ``trace`` with the module ``head`` as the head.

    Raises ValueError if there is no such module, or if its parameters do not enter the logits that
    ``module`` computes of x.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    owners = [name for name, part in parts.items() if name and _has_parameters(part)]
    if head not in owners:
        matches = get_close_matches(head, owners, n=1)
        raise ValueError(
            f"head = {head}: is no module with parameters; there are {', '.join(owners)}"
            + (f". Did you mean {matches[0]}?" if matches else "")
        )
    leaves = frozenset(f"{head}.{name}" for name, _ in parts[head].named_parameters())
    if not _reaches_logits(module, x, head):
        raise ValueError(
            f"head = {head}: does not enter the logits; without the key it is "
            f"{trace.head or 'no single module'}"
        )
    return trace._replace(head=head, leaves=leaves)


def _reaches_logits(module: nn.Module, x: Tensor, part: str) -> bool:
    """Return whether the logits depend on a parameter of the module ``part``.

    Where a pass forbids gradients, this is unknown and taken as true.
    """
    module = copy_module(module).eval().requires_grad_(False)
    parameters = [*module.get_submodule(part).requires_grad_().parameters()]
    with isolate_rng(0, "trial"), torch.enable_grad(), Substitutes(None, torch.tensor(0)):
        logits = module(x)
    if not logits.requires_grad:
        with isolate_rng(0, "trial"), torch.enable_grad(), Substitutes(None, torch.tensor(0)):
            return not module.requires_grad_()(x).requires_grad
    gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


class _TraceMode(TorchFunctionMode):
    """Records every product with a parameter, and detaches its output from the graph before it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.products: list[_Product] = []
        self.matrices: dict[str, Matrix] = {}
        self._module_stack: list[str] = []
        # kept alive, so that no other tensor reuses the memory address that identifies them
        self._kept_alive: list[Tensor] = []
        self._name_by_storage: dict[tuple[int, int], str] = {}
        for name, parameter in module.named_parameters():
            self._register_tensor(name, parameter)
        self._parameter_keys = frozenset(self._name_by_storage)
        for name, part in module.named_modules():
            part.register_forward_pre_hook(
                lambda part, args, name=name: self._module_stack.append(name)
            )
            part.register_forward_hook(
                lambda part, args, output: self._leave_module(), always_call=True
            )
        self._submodules = dict(module.named_modules())

    def _leave_module(self) -> None:
        self._module_stack.pop()

    def _register_tensor(self, name: str, tensor: Tensor) -> None:
        self._kept_alive.append(tensor)
        self._name_by_storage[_storage_key(tensor)] = name

    def _parameter_names(self, arguments: Any) -> list[str]:
        """Return the names of the parameters among the arguments.

        Full views of a parameter count, and so do tensors of its shape computed from it.
        """
        keys = [
            _storage_key(v)
            for v in tree_leaves(arguments)
            if isinstance(v, Tensor) and v.layout is torch.strided
        ]
        return [self._name_by_storage[place] for place in keys if place in self._name_by_storage]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if name in _PRODUCT_OPS and isinstance(output, Tensor):
            # without the input of a layer
            weights = (args[1:], kwargs) if name in _LAYER_OPS else (args, kwargs)
            parameters = self._parameter_names(weights)
            module = self._module_stack[-1] if self._module_stack and self._is_layer(name) else ""
            if parameters or module:
                self._record_matrices(_PRODUCT_OPS[name], weights)
                return self._record_product(_PRODUCT_OPS[name], parameters, module, output)
        elif name in _COMPOSITE_OPS:
            return tree_map(self._detach_block, output)
        else:
            self._follow_derived(name, args, kwargs, output)
        return output

    def _is_layer(self, name: str) -> bool:
        """Return whether the innermost running module is a layer that consists of this product."""
        part = self._submodules[self._module_stack[-1]]
        return (
            isinstance(part, PRODUCT_LAYERS)
            or name in _LAYER_OPS
            and not any(part.children())
            and _has_parameters(part)
        )

    def _record_matrices(self, kind: Matrix, weights: Any) -> None:
        """Record how a product uses the parameters that enter it unchanged."""
        for tensor in tree_leaves(weights):
            if (
                isinstance(tensor, Tensor)
                and tensor.layout is torch.strided
                and _storage_key(tensor) in self._parameter_keys
            ):
                self.matrices.setdefault(self._name_by_storage[_storage_key(tensor)], kind)

    def _record_product(
        self, kind: Matrix, parameters: list[str], module: str, output: Tensor
    ) -> Tensor:
        axis = 1 if kind != "linear" and output.dim() > 1 else -1
        channels = output.shape[axis] if output.dim() else 1
        cut = output.detach().requires_grad_(output.is_floating_point())
        self.products.append(_Product(parameters, module, cut, channels))
        return cut.clone()  # the network may write to the clone in place

    def _detach_block(self, output: Any) -> Any:
        """Detach the output of a recurrent or attention layer.

        Such a layer is no head, and nothing before it is one.
        """
        floats = isinstance(output, Tensor) and output.is_floating_point()
        return output.detach().clone().requires_grad_().clone() if floats else output

    def _follow_derived(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        """Register tensors derived from parameters.

        A tensor that is computed from one parameter and has its shape counts as that parameter. A
        vector parameter that is added to a product belongs to that product.
        """
        if (
            not isinstance(output, Tensor)
            or output.layout is not torch.strided
            or not output.is_floating_point()
        ):
            return
        names = self._parameter_names((args, kwargs))
        sources = [
            n
            for n in names
            if self._parameter(n).dim() > 1 and self._parameter(n).shape == output.shape
        ]
        if len(sources) == 1 and _storage_key(output) not in self._name_by_storage:
            self._register_tensor(sources[0], output)
        elif (
            name in _ADD_OPS
            and self.products
            and output.shape == self.products[-1].output.shape
            and not self.products[-1].module
        ):
            self.products[-1].parameters += [n for n in names if self._parameter(n).dim() == 1]

    def _parameter(self, name: str) -> Tensor:
        return self._submodules[name.rpartition(".")[0]]._parameters[name.rpartition(".")[2]]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _storage_key(tensor: Tensor) -> tuple[int, int]:
    """Return a key that is equal for tensors with the same numbers in the same memory."""
    return storage_key(tensor), tensor.numel()


def _head_of_product(module: nn.Module, product: _Product) -> tuple[str, set[str]]:
    """Return (module whose parameters are exactly those of the product or "", parameter names)."""
    owners = {owning_module(name) for name in product.parameters}
    owner = product.module or (owners.pop() if len(owners) == 1 else "")
    submodule = module.get_submodule(owner)
    module_parameters = {
        f"{owner}.{name}" if owner else name for name, _ in submodule.named_parameters()
    }
    owns_all = (
        bool(owner)
        and module_parameters == set(product.parameters)
        or product.module
        and not product.parameters
    )
    if isinstance(submodule, PRODUCT_LAYERS) or owns_all:
        return owner, module_parameters
    return "", set(product.parameters)


def owning_module(parameter: str) -> str:
    """Return the module that owns a parameter; for a parametrization, the parametrized module."""
    owner, parametrized, _ = parameter.rpartition(".parametrizations.")
    return owner if parametrized else parameter.rpartition(".")[0]


def _last_registered(module: nn.Module) -> tuple[str, set[str]]:
    """Return the last registered Linear, else the last convolution, and its parameters' names."""
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        names = [name for name, part in module.named_modules() if isinstance(part, kind)]
        if names:
            part = module.get_submodule(names[-1])
            return names[-1], {
                f"{names[-1]}.{n}" if names[-1] else n for n, _ in part.named_parameters()
            }
    return "", set()
