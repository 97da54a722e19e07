"""A device "far" that is none: tensors that claim to be there, computed on this CPU.

Inside a ``Machine`` a program for a GPU runs as on one, to the bits of the CPU: to mix tensors of
both devices raises, each wait of the host for the device is noted, and steps can be recorded as
CUDA records them: once, without effect, to be played again on what is then in the memory that they
used.
"""

import torch
import torch.utils._pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedlora_mpi.engine.walk import fill

_setup_privateuseone_for_python_backend("far")
DEVICE = torch.device("far:0")
aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


class Far(torch.Tensor):
    """A tensor on the device; ``near`` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        how = {
            "strides": near.stride(),
            "storage_offset": near.storage_offset(),
            "dtype": near.dtype,
        }
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), **how, device=DEVICE)

    def __init__(self, near):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the machine")


def near(v):
    return v.near if isinstance(v, Far) else v


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Machine(TorchDispatchMode):
    """The device. ``waits``: what the host has waited for; ``strict``: a wait raises RuntimeError."""

    def __init__(self):
        super().__init__()
        self.waits, self.strict, self.tape = [], False, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        far = any(isinstance(v, Far) for v in given)
        asked = kwargs.get("device")
        lands = far if asked is None else torch.device(asked).type == "far"
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if func is aten.copy_.default:
            lands = isinstance(args[0], Far)
        elif (
            func is not aten._to_copy.default
            and far
            and any(v.dim() and not isinstance(v, Far) for v in given)
        ):
            raise RuntimeError(f"{func}: tensors on both devices")
        if far and (func in WAITS or not lands):
            self.waits.append(str(func))
            if self.strict or self.tape is not None:
                raise RuntimeError(f"a synchronizing operation: {func}\nand more")
        args_near, kwargs_near = pytree.tree_map(near, (args, kwargs))
        found = self._run(func, [near(v) for v in given], args_near, kwargs_near)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **kwargs)  # the claimed shape
        known = {id(near(v)): v for v in given}

        def up(v):
            return (
                known.get(id(v), Far(v) if lands and func is not WAITS[0] else v)
                if isinstance(v, torch.Tensor)
                else v
            )

        return pytree.tree_map(up, found)

    def _run(self, func, given, args, kwargs):
        if self.tape is None:
            return func(*args, **kwargs)
        before = [v.clone() for v in given]
        found = func(*args, **kwargs)
        outputs = [v for v in pytree.tree_leaves(found) if isinstance(v, torch.Tensor)]
        views = outputs and all(any(same_memory(o, v) for v in given) for o in outputs)
        if torch.Tag.inplace_view in func.tags or views and not func._schema.is_mutable:
            return found
        for v, was in zip(given, before, strict=True):
            fill(v, was)  # a recording has no effect
        self.tape.append((func, given, args, kwargs, outputs))
        return found

    def play(self, tape):
        """Compute what was recorded, on what the memory holds now."""
        with no_dispatch():
            for func, given, args, kwargs, outputs in tape:
                found = [
                    v
                    for v in pytree.tree_leaves(func(*args, **kwargs))
                    if isinstance(v, torch.Tensor)
                ]
                for place, value in zip(outputs, found, strict=True):
                    if not any(same_memory(place, v) for v in given):
                        place.copy_(value)


def as_cuda(machine, monkeypatch):
    """Let those functions of ``torch.cuda`` that record be about ``machine``."""

    class CUDAGraph:
        def replay(self):
            machine.play(self.tape)

    class graph:
        def __init__(self, graph, pool=None):
            self.graph = graph

        def __enter__(self):
            machine.tape = self.graph.tape = []

        def __exit__(self, *_):
            machine.tape = None

    class Stream:
        def wait_stream(self, other):
            pass

    class stream:
        def __init__(self, stream):
            pass

        __enter__ = __exit__ = lambda self, *_: None

    fakes = {
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: setattr(machine, "strict", mode == "error"),
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
