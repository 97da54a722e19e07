"""Compile a training step with torch: forward pass, backward pass and update become one function.

The step is traced to one graph of tensor operations, through autograd, vmap and the method's loss,
so no method needs code for it. Values that a loss holds besides its arguments become constants of
the graph. A graph is reused only for a loss with the same code and the same values.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

# largest number of graphs; a loss that differs in every round is compiled in every round
_MAX_GRAPHS = 64


def find_compiler() -> str | None:
    """The path of the C++ compiler, which torch needs on a CPU; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def need_compiler() -> None:
    """Raise ValueError if there is no C++ compiler."""
    if find_compiler() is None:
        name = os.environ.get("CXX", "g++")
        raise ValueError(
            f"compile = true: there is no C++ compiler {name}; install one, set CXX, or compile: "
            "false"
        )


class StepCompiler:
    """The compiled functions of a trainer; a step is compiled when it first runs.

    backend: of torch.compile; ``eager`` only finds out whether the steps can be compiled.
    """

    def __init__(self, backend: Literal["inductor", "eager"] = "inductor") -> None:
        self._backend = backend
        # each with the objects that its key knows by id, to keep them alive
        self._graphs: dict[tuple, tuple[Callable, list[Any]]] = {}

    def compile_step(self, step: Callable, identity: tuple, *fixed_args: Any) -> Callable:
        """``step(*fixed_args, ...)`` as a compiled function of the remaining arguments.

        The step may write to the tensors in ``fixed_args``. These tensors are inputs of the graph;
        everything else in ``fixed_args`` is part of the graph. identity: what ``step`` computes,
        apart from the layout of the tensors; functions in it are compared by their code and the
        values that they hold.
        """
        kept_alive: list[Any] = []
        step_key, (fixed_tensors, fixed_layout) = (
            identity_key(identity, kept_alive),
            split_tensors(fixed_args),
        )

        def run_compiled(*args: Any) -> Any:
            arg_tensors, arg_layout = split_tensors(args)
            key = step_key, fixed_layout, arg_layout
            if key not in self._graphs:
                # never run the step uncompiled: its last bits would depend on the ranks
                evict_oldest(self._graphs, _MAX_GRAPHS)
                self._graphs[key] = (
                    _compile_step(
                        step, (*fixed_args, *args), fixed_tensors + arg_tensors, self._backend
                    ),
                    kept_alive,
                )
            with torch.no_grad():
                return self._graphs[key][0](*fixed_tensors, *arg_tensors)

        return run_compiled


def evict_oldest(cache: dict, max_size: int) -> None:
    """Drop the oldest entry if ``cache`` has ``max_size`` entries or more."""
    if len(cache) >= max_size:
        del cache[next(iter(cache))]


def split_tensors(values: tuple) -> tuple[list[Tensor], tuple]:
    """(the detached tensors in ``values``, their layout and everything else in ``values``)."""
    flat, spec = pytree.tree_flatten(values)
    tensors = [leaf.detach() for leaf in flat if isinstance(leaf, Tensor)]
    layout = tuple((v.shape, v.stride(), v.dtype, v.device) for v in tensors)
    return tensors, (
        layout,
        tuple(None if isinstance(leaf, Tensor) else leaf for leaf in flat),
        spec,
    )


def _compile_step(step: Callable, args: tuple, tensors: Sequence[Tensor], backend: str) -> Callable:
    """Return ``step(*args)`` as a compiled function of the tensors in ``args``."""
    flat, spec = pytree.tree_flatten(args)

    def step_of_tensors(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return step(
            *pytree.tree_unflatten(
                [next(remaining) if isinstance(v, Tensor) else v for v in flat], spec
            )
        )

    # on copies, because tracing runs the step
    graph = make_fx(step_of_tensors)(*map(_clone_strided, tensors))
    return torch.compile(graph, fullgraph=True, dynamic=False, backend=backend)


def _clone_strided(v: Tensor) -> Tensor:
    """Return a copy in the same layout. An expanded ``v`` is returned itself, because no step
    writes to it.
    """
    if 0 in (stride for stride, length in zip(v.stride(), v.shape, strict=True) if length > 1):
        return v
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).copy_(v)


def identity_key(value: Any, kept_alive: list[Any]) -> Any:
    """Return a hashable key that is equal for values that compute the same.

    Objects that the key knows only by their id are added to ``kept_alive``.
    """
    key_of = partial(identity_key, kept_alive=kept_alive)
    if isinstance(value, FunctionType):
        cells = tuple(key_of(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, cells, key_of(value.__defaults__), key_of(value.__kwdefaults__)
    if isinstance(value, MethodType):
        return key_of(value.__func__), key_of(value.__self__)
    if isinstance(value, partial):
        return key_of(value.func), key_of(value.args), key_of(value.keywords)
    if isinstance(value, dict):
        return tuple((name, key_of(v)) for name, v in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(key_of, value))
    if not isinstance(value, Tensor):
        try:
            hash(value)
            return type(value), value
        except TypeError:
            if is_dataclass(value):  # such as a model in evaluation mode, a new one per round
                return type(value), tuple(
                    key_of(getattr(value, field.name)) for field in fields(value)
                )
    kept_alive.append(value)
    return id(value)
