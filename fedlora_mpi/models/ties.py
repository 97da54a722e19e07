"""Tied weights: parameters and buffers that are in several places of a network."""

from typing import Any

from torch import nn
from torch.func import functional_call

from ..core.tree import Tree


def find_leaf_names(
    network: nn.Module, body: nn.Module, head: str, ties: dict[str, str]
) -> tuple[dict[str, str], ...]:
    """Return {name in the module: leaf} for a network, for its body and for its head.

    ``head`` is the name of the head in the network.
    """
    prefix = f"{head}." if head else ""
    return (
        {n: ties.get(n, n) for n in named_tensors(network)},
        {n: ties.get(n, n) for n in named_tensors(body)},
        {n: ties.get(prefix + n, prefix + n) for n in named_tensors(network.get_submodule(head))},
    )


def named_tensors(module: nn.Module, all_names: bool = False) -> Tree:
    """Return parameters and buffers by name.

    A tensor in several places has only its first name, or each name with ``all_names``.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    all_tensors = parameters | dict(module.named_buffers(remove_duplicate=False))
    first_name = {id(v): n for n, v in reversed(all_tensors.items())}
    return {n: v for n, v in all_tensors.items() if all_names or first_name[id(v)] == n}


def call_with_leaves(module: nn.Module, leaves: Tree, args: tuple, kwargs: Any = None) -> Any:
    """Return ``module(*args, **kwargs)`` with parameters and buffers from ``leaves``.

    leaves: by the names of ``named_tensors``; afterwards it has what the pass has put in their
    places. torch's own way of tying leaves values in a module that has two names.
    """
    places = _find_places(module)
    values = {place: leaves[name] for place, name in places.items() if name in leaves}
    result = functional_call(module, values, args, kwargs, tie_weights=False)
    leaves.update({name: values[name] for name in leaves if name in values})
    return result


def _find_places(module: nn.Module) -> dict[str, str]:
    """Return {place: first name of its tensor}; a module with several names has its places once."""
    first_names: dict[int, str] = {}
    places = {}
    owners = list(module.named_modules())
    for registry in ("_parameters", "_buffers"):
        for prefix, owner in owners:
            for attribute, value in getattr(owner, registry).items():
                if value is not None:
                    place = f"{prefix}.{attribute}" if prefix else attribute
                    places[place] = first_names.setdefault(id(value), place)
    return places


def find_ties(module: nn.Module) -> dict[str, str]:
    """Return {further name: first name} of parameters and buffers in several places.

    Raises ValueError if two tensors share memory and one is trained: a step would change both.
    """
    unique_tensors = named_tensors(module)
    name_at_address: dict[int, str] = {}
    for name, value in unique_tensors.items():
        address = value.data_ptr() or id(value)  # an empty tensor and one on meta have none
        earlier = name_at_address.setdefault(address, name)
        if earlier != name and (value.requires_grad or unique_tensors[earlier].requires_grad):
            raise ValueError(
                f"name: {earlier} and {name} of the network are two tensors in one memory; "
                "register one and the same nn.Parameter in both places to tie them, or clone() it"
            )
    first_name = {id(v): n for n, v in unique_tensors.items()}
    return {
        n: first_name[id(v)]
        for n, v in named_tensors(module, all_names=True).items()
        if first_name[id(v)] != n
    }


def restore_ties(module: nn.Module, ties: dict[str, str]) -> nn.Module:
    """Return ``module`` with its ties restored, which moving it to another device has undone."""
    values = named_tensors(module, all_names=True)
    for name, first in ties.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        registry: dict[str, Any] = (
            owner._parameters if attribute in owner._parameters else owner._buffers
        )
        registry[attribute] = values[first]
    return module
