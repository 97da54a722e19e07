"""Parameters and buffers that are in several places of a network."""

from torch import nn

from ..core.tree import Tree


def find_places(
    whole: nn.Module, body: nn.Module, head: str, ties: dict[str, str]
) -> tuple[dict[str, str], ...]:
    """{name there: leaf} of a network, its body and its head, which is a module of the network."""
    above = f"{head}." if head else ""
    return (
        {n: ties.get(n, n) for n in tensors(whole)},
        {n: ties.get(n, n) for n in tensors(body)},
        {n: ties.get(above + n, above + n) for n in tensors(whole.get_submodule(head))},
    )


def tensors(module: nn.Module, again: bool = False) -> Tree:
    """Parameters and buffers by name; those in several places by their first, or, ``again``, by
    each.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    every = parameters | dict(module.named_buffers(remove_duplicate=False))
    first = {id(v): n for n, v in reversed(every.items())}
    return {n: v for n, v in every.items() if again or first[id(v)] == n}


def find_ties(module: nn.Module) -> dict[str, str]:
    """{further name: first name} of parameters and buffers in several places. Raises ValueError for
    two in one memory of which one is trained: a step would move the other, too.
    """
    once = tensors(module)
    memory: dict[int, str] = {}
    for name, value in once.items():
        other = memory.setdefault(value.data_ptr(), name) if value.numel() else name
        if other != name and (value.requires_grad or once[other].requires_grad):
            raise ValueError(
                f"name: {other} and {name} of the network are two tensors in one memory; register "
                "one and the same nn.Parameter in both places to tie them, or clone() it"
            )
    first = {id(v): n for n, v in once.items()}
    return {n: first[id(v)] for n, v in tensors(module, again=True).items() if first[id(v)] != n}


def tie(module: nn.Module, ties: dict[str, str]) -> nn.Module:
    """``module`` with its ties, which moving it to another device has undone."""
    values = tensors(module, again=True)
    for name, first in ties.items():
        owner, _, place = name.rpartition(".")
        owner = module.get_submodule(owner)
        kind = owner._parameters if place in owner._parameters else owner._buffers
        kind[place] = values[first]
    return module
