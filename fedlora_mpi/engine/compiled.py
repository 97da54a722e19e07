"""A training step as one function that torch compiles: forward, backward and update, fused where
they can be.

The step is traced to one graph of tensor operations, through autograd, vmap and everything that a
method's loss does, so no method knows of it. What a loss holds beside its arguments becomes a
constant of the graph; a graph is used again only for a loss of the same code that holds the same.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

# graphs that are kept; a loss that is another one in every round is compiled anew in every round
_AT_MOST = 64


def compiler() -> str | None:
    """The C++ compiler, which torch needs on a CPU; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def need_compiler() -> None:
    """Raise ValueError where there is no C++ compiler."""
    if compiler() is None:
        name = os.environ.get("CXX", "g++")
        raise ValueError(
            f"compile = true: there is no C++ compiler {name}; install one, set CXX, or compile: "
            "false"
        )


class Compiled:
    """The compiled functions of a trainer; filled as steps are met."""

    def __init__(self) -> None:
        # with what the key knows by its id, so that it lives on
        self._known: dict[tuple, tuple[Callable, list[Any]]] = {}

    def of(self, step: Callable, told: tuple, *fixed: Any) -> Callable:
        """``step(*fixed, ...)`` as a function of what is left, which may write to the tensors in
        ``fixed``.

        told: what decides, beside the layout of the tensors, what ``step`` computes; functions in
        it count by their code and by what they hold. Tensors in ``fixed`` are given to the graph,
        all else is part of it.
        """
        held: list[Any] = []
        own, (tensors, layout) = known_as(told, held), parted(fixed)

        def play(*more: Any) -> Any:
            others, given = parted(more)
            key = own, layout, given
            if key not in self._known:
                # never the step as it is: its last bits would depend on the ranks
                make_room(self._known, _AT_MOST)
                self._known[key] = _made(step, (*fixed, *more), tensors + others), held
            with torch.no_grad():
                return self._known[key][0](*tensors, *others)

        return play


def make_room(known: dict, most: int) -> None:
    """Drop the oldest where there are ``most``."""
    if len(known) >= most:
        del known[next(iter(known))]


def parted(given: tuple) -> tuple[list[Tensor], tuple]:
    """(the tensors in ``given``, what else there is to know of it)."""
    flat, spec = pytree.tree_flatten(given)
    tensors = [leaf.detach() for leaf in flat if isinstance(leaf, Tensor)]
    layout = tuple((v.shape, v.stride(), v.dtype, v.device) for v in tensors)
    return tensors, (
        layout,
        tuple(None if isinstance(leaf, Tensor) else leaf for leaf in flat),
        spec,
    )


def _made(step: Callable, given: tuple, tensors: Sequence[Tensor]) -> Callable:
    """``step(*given)`` as a compiled function of the tensors in ``given``."""
    flat, spec = pytree.tree_flatten(given)

    def whole(*tensors: Tensor) -> Any:
        left = iter(tensors)
        return step(
            *pytree.tree_unflatten([next(left) if isinstance(v, Tensor) else v for v in flat], spec)
        )

    graph = make_fx(whole)(*map(_copied, tensors))  # on copies: the trace is a step, too
    return torch.compile(graph, fullgraph=True, dynamic=False)


def _copied(v: Tensor) -> Tensor:
    """A copy in the same layout; ``v`` where it repeats its numbers, for then no step writes to it."""
    if 0 in (stride for stride, length in zip(v.stride(), v.shape, strict=True) if length > 1):
        return v
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).copy_(v)


def known_as(value: Any, held: list[Any]) -> Any:
    """Something hashable, equal for values that compute the same; ``held`` takes what it knows by
    its id.
    """
    known = partial(known_as, held=held)
    if isinstance(value, FunctionType):
        cells = tuple(known(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, cells, known(value.__defaults__), known(value.__kwdefaults__)
    if isinstance(value, MethodType):
        return known(value.__func__), known(value.__self__)
    if isinstance(value, partial):
        return known(value.func), known(value.args), known(value.keywords)
    if isinstance(value, dict):
        return tuple((name, known(v)) for name, v in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(known, value))
    if not isinstance(value, Tensor):
        try:
            hash(value)
            return type(value), value
        except TypeError:
            if is_dataclass(value):  # such as a model in evaluation mode, made anew in every round
                return type(value), tuple(
                    known(getattr(value, field.name)) for field in fields(value)
                )
    held.append(value)
    return id(value)
