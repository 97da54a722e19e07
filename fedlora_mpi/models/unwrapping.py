"""Unwrap the plain network that a builder returns, and explain the errors of a user's network."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.escapes import summarize_error

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(module: nn.Module) -> nn.Module:
    """Return ``module`` on the CPU without DataParallel, DistributedDataParallel and torch.compile.

    Raises ValueError for scripted modules and for weights on the meta device.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"name: {_layer_label(name)} is a scripted or traced module (torch.jit), whose "
                "weights cannot be given from outside; return the nn.Module that it was made from"
            )
    module = _unwrap_layer(module)
    for layer in module.modules():
        for name, child in layer._modules.items():
            layer._modules[name] = None if child is None else _unwrap_layer(child)
        layer._compiled_call_impl = None  # set by ``layer.compile()``
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_meta:
            raise ValueError(
                f"name: {name} is on device meta and has no numbers; build the model on the CPU"
            )
        if value.device.type != "cpu":
            module = module.cpu()
            break
    for layer in module.modules():
        _detach_attributes(layer)
    return module


def has_lazy_layers(module: nn.Module) -> bool:
    """Return whether some layer, such as LazyLinear, gets its shape in the first pass."""
    return any(map(nn.parameter.is_lazy, (*module.parameters(), *module.buffers())))


def copy_module(module: nn.Module, share: bool = False) -> nn.Module:
    """Return a deep copy; with ``share``, one whose parameters have the memory of the module's.

    Raises ValueError with the name of an attribute that cannot be copied.
    """
    shared = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) for p in module.parameters() if share
    }
    try:
        return copy.deepcopy(module, shared)
    except Exception as error:
        name = next(_uncopyable_attributes(module), "it")
        raise ValueError(
            f"name: {name} cannot be copied by copy.deepcopy ({summarize_error(error)}); "
            "keep it out of the module"
        ) from error


def remove_values(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` on the meta device; nothing of the parameters is copied."""
    places = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, places).to("meta")


@contextmanager
def explain_refusal(shape: Iterable[int]) -> Iterator[None]:
    """Turn any error of a user's network in a forward pass into a ValueError."""
    try:
        yield
    except Exception as error:
        sizes, reason = list(shape), summarize_error(error)
        # torchvision's ViT
        way_out = f"; set model.image_size = {sizes[-1]}" if "image height" in reason else ""
        raise ValueError(
            f"name: the model refuses inputs of shape {sizes}: {reason}{way_out}"
        ) from error


def _layer_label(name: str) -> str:
    return f"layer {name}" if name else "the model"


def _unwrap_layer(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, _PARALLEL):
            module = module.module
        elif "_orig_mod" in module._modules:  # made by torch.compile(module)
            module = module.get_submodule("_orig_mod")
        else:
            return module


def _detach_attributes(layer: nn.Module) -> None:
    """Detach attributes of ``layer`` from the graph that computed them.

    torch.nn.utils.weight_norm makes such attributes. They could not be copied otherwise.
    """
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and not value.is_leaf:
            vars(layer)[name] = value.detach()


def _uncopyable_attributes(module: nn.Module) -> Iterator[str]:
    """Yield the names of attributes that cannot be copied."""
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                yield f"{path}.{name}".lstrip(".")
