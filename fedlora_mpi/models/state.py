"""What a network can remember from pass to pass, as values to compare.

That is, beside its parameters and float buffers: plain attributes of its modules and of their
classes, integer buffers, those that are None until a pass makes them, and the global and enclosing
variables that their functions name.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))
_LIBRARIES = ("torch", "torchvision", "transformers", "builtins")
_NUMBERS = (bool, int, float, complex, np.generic)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, dict, deque, set)
_PLAIN = (*_NUMBERS, *_GENERATORS, *_CONTAINERS, Tensor, np.ndarray, itertools.count)
_WORDS = (str, bytes, torch.dtype, torch.device, itertools.count)
_DEPTH = 6  # of containers and objects in one another
_FEW = 16  # items of a list that are named one by one


class Value(NamedTuple):
    """Something remembered, at one moment."""

    kind: str  # "number", "array", "generator" or ""
    content: object  # equal where it is the same


Memory = dict[str, Value]  # by what the user calls it


def attributes_of(module: nn.Module) -> dict[str, str]:
    """{attribute: digest} of the plain attributes of all layers, equal in every process that has
    built the same.
    """
    found = remembered(module)
    return {
        n: hashlib.blake2b(_stable(v).encode(), digest_size=8).hexdigest()
        for n, v in found.items()
        if n.startswith("attribute ")
    }


def _stable(value: object) -> str:
    """A text that does not depend on the order of a set."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_stable, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_stable, value))})"
    return repr(value)


def unset(module: nn.Module) -> frozenset[str]:
    """Names of buffers that are None."""
    layers = module.named_modules()
    every = (
        (f"{path}.{name}", value)
        for path, layer in layers
        for name, value in layer._buffers.items()
    )
    return frozenset(name.lstrip(".") for name, value in every if value is None)


def remembered(module: nn.Module, made: frozenset[str] = frozenset()) -> Memory:
    """What ``module`` holds now; ``made``: names of buffers that were None."""
    found: Memory = {}
    seen = {id(layer) for layer in module.modules()}
    classes, functions = {}, []
    for path, layer in module.named_modules():
        at = f"{path}." if path else ""
        for name, value in vars(layer).items():
            if name not in _OWN:
                _add(found, f"attribute {at}{name}", value, seen, 0)
                functions.append(value)
        for name, value in layer._buffers.items():
            if f"{at}{name}" in made:
                found[f"buffer {at}{name}"] = Value("", _content(value, seen, 0))
            elif value is not None and not value.is_floating_point():
                found[f"buffer {at}{name}"] = Value("number", _content(value, seen, 0))
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            functions += hooks.values()
        classes |= dict.fromkeys(type(layer).__mro__)
    for kind in classes:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            for name, value in vars(kind).items():
                functions.append(getattr(value, "fget", value))
                if isinstance(value, _PLAIN):
                    _add(found, f"class attribute {kind.__name__}.{name}", value, seen, 0)
    for function in functions:
        for name, value in _variables(function, seen):
            if isinstance(value, _PLAIN):
                _add(found, f"variable {name}", value, seen, 0)
    return found


@contextmanager
def forgetting(module: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Put the attributes of these submodules back afterwards, so that no pass finds what another
    has left: a tensor of another client, of a recording or of a transform that has ended.
    """
    before = []
    for name in names:
        layer = module.get_submodule(name)
        own = {
            key: (value, _shallow(value)) for key, value in vars(layer).items() if key not in _OWN
        }
        before.append((layer, own, [key for key, value in layer._buffers.items() if value is None]))
    try:
        yield
    finally:
        for layer, own, empty in before:
            layer._buffers.update(dict.fromkeys(empty))
            for key in [key for key in vars(layer) if key not in _OWN and key not in own]:
                del vars(layer)[key]
            for key, (value, inside) in own.items():
                vars(layer)[key] = value
                _refill(value, inside)


def _shallow(value: object) -> object:
    """What is inside a container; None for anything else."""
    if type(value) in (list, dict, set):
        return type(value)(value)
    return list(value) if type(value) is deque else None


def _refill(value: object, inside: object) -> None:
    """Give a container what was inside."""
    if inside is not None:
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(inside)


def _add(found: Memory, name: str, value: object, seen: set[int], depth: int) -> None:
    """Note ``value``; of a dict or an object all that it holds, each by its name."""
    if isinstance(value, (*_NUMBERS, itertools.count)):
        found[name] = Value("number", repr(value))
    elif isinstance(value, _GENERATORS):
        found[name] = Value("generator", _content(value, seen, depth))
    elif isinstance(value, Tensor | np.ndarray):
        found[name] = Value("array", _content(value, seen, depth))
    elif depth < _DEPTH and isinstance(value, list | tuple) and len(value) <= _FEW:
        found[name] = Value("", len(value))
        for at, inside in enumerate(value):
            _add(found, f"{name}[{at}]", inside, seen, depth + 1)
    elif depth < _DEPTH and isinstance(value, dict):
        found[name] = Value("", tuple(map(repr, value)))
        for key, inside in list(value.items()):
            _add(found, f"{name}[{key!r}]", inside, seen, depth + 1)
    elif depth < _DEPTH and (inside := _parts(value)) is not None:
        if id(value) not in seen:
            seen.add(id(value))
            for key, part in inside.items():
                _add(found, f"{name}.{key}", part, seen, depth + 1)
    else:
        found[name] = Value("", _content(value, seen, depth))


def _parts(value: object) -> dict | None:
    """The attributes of an object of a user's class, or of a layer that is no registered one; else
    None.
    """
    home = type(value).__module__.partition(".")[0]
    if isinstance(value, nn.Module) or (
        home not in (*_LIBRARIES, "numpy") and hasattr(value, "__dict__")
    ):
        return None if isinstance(value, type | FunctionType | MethodType) else dict(vars(value))
    return None


def _content(value: object, seen: set[int], depth: int) -> object:
    """Something that is equal for equal values."""
    if isinstance(value, torch.Generator):
        return _digest(value.get_state().numpy())
    if isinstance(value, np.random.Generator):
        return _content(value.bit_generator.state, seen, depth)
    if isinstance(value, np.random.RandomState):
        return _content(value.get_state(legacy=False), seen, depth)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), _bits(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, _digest(value) if not value.dtype.hasobject else None
    if value is None or isinstance(value, (*_NUMBERS, *_WORDS)):
        return repr(value)
    if depth >= _DEPTH:
        return type(value).__name__
    inside = partial(_content, seen=seen, depth=depth + 1)
    if isinstance(value, list | tuple | deque):
        return tuple(map(inside, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(repr, value))
    if isinstance(value, dict):
        return tuple((repr(key), inside(v)) for key, v in value.items())
    if (parts := _parts(value)) is not None and id(value) not in seen:
        seen.add(id(value))
        return tuple((key, inside(v)) for key, v in parts.items())
    return getattr(value, "__qualname__", type(value).__name__)


def _bits(value: Tensor) -> object:
    """The numbers of a tensor."""
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
    return hashlib.blake2b(np.ascontiguousarray(array), digest_size=16).digest()


def _variables(function: object, seen: set[int]) -> Iterator[tuple[str, object]]:
    """The global and enclosing variables that a function of the user's names, and those of the
    functions among them."""
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
        yield from _variables(value, seen)


def _globals(function: FunctionType) -> Iterator[tuple[str, object]]:
    names, waiting = set(), [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    yield from (
        (name, function.__globals__[name]) for name in sorted(names & function.__globals__.keys())
    )


def _defaults(function: FunctionType) -> Iterator[tuple[str, object]]:
    """What arguments that nobody gives are, which are made once for all calls."""
    count = function.__code__.co_argcount
    given = function.__defaults__ or ()
    yield from zip(function.__code__.co_varnames[count - len(given) : count], given, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _enclosing(function: FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing was put into it
            continue
