"""Read the state that a network can keep between passes, as values to compare.

Parameters and float buffers are not included. The state consists of plain attributes of the modules
and of their classes, integer buffers, buffers that are None until a pass sets them, and the global
and enclosing variables that the network's functions name.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_LIBRARIES = ("torch", "torchvision", "transformers", "builtins")
_NUMBERS = (bool, int, float, complex, np.generic)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, dict, deque, set)
_TRACKED_TYPES = (*_NUMBERS, *_GENERATORS, *_CONTAINERS, Tensor, np.ndarray, itertools.count)
_ATOMIC_TYPES = (str, bytes, torch.dtype, torch.device, itertools.count)
_MAX_DEPTH = 6  # depth of nested containers and objects
_MAX_ITEMS = 16  # longest list whose items are recorded one by one


class Value(NamedTuple):
    """One part of a network's state at one moment."""

    kind: str  # "number", "array", "generator" or ""
    content: object  # equal for equal contents


Memory = dict[str, Value]  # keys are names that the user knows


def attribute_digests(module: nn.Module) -> dict[str, str]:
    """Return {attribute: digest} of the plain attributes of all layers.

    Every process that has built the same network gets the same digests.
    """
    memory = read_memory(module)
    return {
        n: hashlib.blake2b(_stable_repr(v).encode(), digest_size=8).hexdigest()
        for n, v in memory.items()
        if n.startswith("attribute ")
    }


def _stable_repr(value: object) -> str:
    """Return a text of a value that does not depend on the order of a set."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_stable_repr, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_stable_repr, value))})"
    return repr(value)


def none_buffers(module: nn.Module) -> frozenset[str]:
    """Return the names of buffers that are None."""
    layers = module.named_modules()
    buffers = (
        (f"{path}.{name}", value)
        for path, layer in layers
        for name, value in layer._buffers.items()
    )
    return frozenset(name.lstrip(".") for name, value in buffers if value is None)


def read_memory(module: nn.Module, none_buffers: frozenset[str] = frozenset()) -> Memory:
    """Return the present state of ``module``.

    ``none_buffers``: names of buffers that were None when the network was built.
    """
    memory: Memory = {}
    seen = {id(layer) for layer in module.modules()}
    classes: dict[type, None] = {}
    functions: list[object] = []
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(layer).items():
            if name not in _MODULE_ATTRIBUTES:
                _add_to_memory(memory, f"attribute {prefix}{name}", value, seen, 0)
                functions.append(value)
        for name, value in layer._buffers.items():
            if f"{prefix}{name}" in none_buffers:
                memory[f"buffer {prefix}{name}"] = Value("", _comparable(value, seen, 0))
            elif value is not None and not value.is_floating_point():
                memory[f"buffer {prefix}{name}"] = Value("number", _comparable(value, seen, 0))
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            functions += hooks.values()
        classes |= dict.fromkeys(type(layer).__mro__)
    for kind in classes:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            for name, value in vars(kind).items():
                functions.append(getattr(value, "fget", value))
                if isinstance(value, _TRACKED_TYPES):
                    _add_to_memory(
                        memory, f"class attribute {kind.__name__}.{name}", value, seen, 0
                    )
    for function in functions:
        for name, value in _captured_variables(function, seen):
            if isinstance(value, _TRACKED_TYPES):
                _add_to_memory(memory, f"variable {name}", value, seen, 0)
    return memory


@contextmanager
def restore_attributes(module: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Restore the attributes of these submodules afterwards.

    Otherwise a pass could use a tensor that another pass has stored: one of another client, of a
    graph capture or of a transform that has ended.
    """
    saved = []
    for name in names:
        layer = module.get_submodule(name)
        attributes = {
            key: (value, _copy_container(value))
            for key, value in vars(layer).items()
            if key not in _MODULE_ATTRIBUTES
        }
        saved.append(
            (layer, attributes, [key for key, value in layer._buffers.items() if value is None])
        )
    try:
        yield
    finally:
        for layer, attributes, none_names in saved:
            layer._buffers.update(dict.fromkeys(none_names))
            for key in [
                key
                for key in vars(layer)
                if key not in _MODULE_ATTRIBUTES and key not in attributes
            ]:
                del vars(layer)[key]
            for key, (value, items) in attributes.items():
                vars(layer)[key] = value
                _refill_container(value, items)


def _copy_container(value: Any) -> Any:
    """Return a copy of a container's items; None for anything else."""
    if type(value) in (list, dict, set):
        return type(value)(value)
    return list(value) if type(value) is deque else None


def _refill_container(value: Any, items: Any) -> None:
    """Put the items back into their container."""
    if items is not None:
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(items)


def _add_to_memory(memory: Memory, name: str, value: object, seen: set[int], depth: int) -> None:
    """Record ``value``; for a list, dict or object, record each item or attribute by its name."""
    if isinstance(value, (*_NUMBERS, itertools.count)):
        memory[name] = Value("number", repr(value))
    elif isinstance(value, _GENERATORS):
        memory[name] = Value("generator", _comparable(value, seen, depth))
    elif isinstance(value, Tensor | np.ndarray):
        memory[name] = Value("array", _comparable(value, seen, depth))
    elif depth < _MAX_DEPTH and isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS:
        memory[name] = Value("", len(value))
        for i, item in enumerate(value):
            _add_to_memory(memory, f"{name}[{i}]", item, seen, depth + 1)
    elif depth < _MAX_DEPTH and isinstance(value, dict):
        memory[name] = Value("", tuple(map(repr, value)))
        for key, item in list(value.items()):
            _add_to_memory(memory, f"{name}[{key!r}]", item, seen, depth + 1)
    elif depth < _MAX_DEPTH and (item := _attributes(value)) is not None:
        if id(value) not in seen:
            seen.add(id(value))
            for key, part in item.items():
                _add_to_memory(memory, f"{name}.{key}", part, seen, depth + 1)
    else:
        memory[name] = Value("", _comparable(value, seen, depth))


def _attributes(value: object) -> dict | None:
    """Return the attributes of an unregistered layer or an object of a user's class; else None."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, nn.Module) or (
        package not in (*_LIBRARIES, "numpy") and hasattr(value, "__dict__")
    ):
        return None if isinstance(value, type | FunctionType | MethodType) else dict(vars(value))
    return None


def _comparable(value: object, seen: set[int], depth: int) -> object:
    """Return an object that is equal for equal values."""
    if isinstance(value, torch.Generator):
        return _digest(value.get_state().numpy())
    if isinstance(value, np.random.Generator):
        return _comparable(value.bit_generator.state, seen, depth)
    if isinstance(value, np.random.RandomState):
        return _comparable(value.get_state(legacy=False), seen, depth)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), _tensor_digest(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, _digest(value) if not value.dtype.hasobject else None
    if value is None or isinstance(value, (*_NUMBERS, *_ATOMIC_TYPES)):
        return repr(value)
    if depth >= _MAX_DEPTH:
        return type(value).__name__
    comparable = partial(_comparable, seen=seen, depth=depth + 1)
    if isinstance(value, list | tuple | deque):
        return tuple(map(comparable, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(repr, value))
    if isinstance(value, dict):
        return tuple((repr(key), comparable(v)) for key, v in value.items())
    if (attributes := _attributes(value)) is not None and id(value) not in seen:
        seen.add(id(value))
        return tuple((key, comparable(v)) for key, v in attributes.items())
    return getattr(value, "__qualname__", type(value).__name__)


def _tensor_digest(value: Tensor) -> object:
    """Return a digest of the numbers of a tensor; None if they cannot be read."""
    if (
        value.layout != torch.strided
        or value.is_meta
        or value.is_quantized
        or nn.parameter.is_lazy(value)
    ):
        return None
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return _digest(value.view(torch.uint8).numpy()) if value.numel() else None


def _digest(array: np.ndarray) -> bytes:
    # before Python 3.12 numpy's stubs do not call an array a buffer
    return hashlib.blake2b(
        np.ascontiguousarray(array),  # type: ignore[arg-type]
        digest_size=16,
    ).digest()


def _captured_variables(function: object, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Yield the variables that a user's function uses, and those of the functions among them.

    These are global variables, enclosing variables and default values of arguments.
    """
    function = getattr(function, "__func__", function)
    if (
        not isinstance(function, FunctionType)
        or (function.__module__ or "").partition(".")[0] in _LIBRARIES
    ):
        return
    if id(function) in seen:
        return
    seen.add(id(function))
    for name, value in (*_globals(function), *_enclosing(function), *_defaults(function)):
        yield name, value
        yield from _captured_variables(value, seen)


def _globals(function: FunctionType) -> Iterator[tuple[str, object]]:
    names: set[str] = set()
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        names.update(code.co_names)
        pending += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    yield from (
        (name, function.__globals__[name]) for name in sorted(names & function.__globals__.keys())
    )


def _defaults(function: FunctionType) -> Iterator[tuple[str, object]]:
    """Yield default values of arguments; Python creates them once for all calls."""
    count = function.__code__.co_argcount
    defaults = function.__defaults__ or ()
    yield from zip(
        function.__code__.co_varnames[count - len(defaults) : count], defaults, strict=True
    )
    yield from (function.__kwdefaults__ or {}).items()


def _enclosing(function: FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the variable is not set yet
            continue
