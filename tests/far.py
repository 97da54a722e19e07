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

from fedlora_mpi.engine.walk import copy_into

_setup_privateuseone_for_python_backend("far")
# gradient checkpointing asks the accelerator for them, on a CPU too
torch.far.get_amp_supported_dtype = lambda: [torch.bfloat16]
DEVICE = torch.device("far:0")
aten = torch.ops.aten
WAITING_OPS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


class FarTensor(torch.Tensor):
    """A tensor on the device; ``near`` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor):
        layout = {
            "strides": cpu_tensor.stride(),
            "storage_offset": cpu_tensor.storage_offset(),
            "dtype": cpu_tensor.dtype,
        }
        return torch.Tensor._make_wrapper_subclass(cls, cpu_tensor.size(), **layout, device=DEVICE)

    def __init__(self, cpu_tensor):
        self.cpu_tensor = cpu_tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the machine")


def to_near(v):
    return v.cpu_tensor if isinstance(v, FarTensor) else v


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class FarMachine(TorchDispatchMode):
    """The device. ``waits``: what the host has waited for; ``strict``:
    a wait raises RuntimeError."""

    def __init__(self):
        super().__init__()
        self.wait_names, self.raises_on_wait, self.tape = [], False, None
        self.stream, self.stream_calls = None, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        has_far = any(isinstance(v, FarTensor) for v in tensors)
        wanted_device = kwargs.get("device")
        is_far_result = (
            has_far if wanted_device is None else torch.device(wanted_device).type == "far"
        )
        if wanted_device is not None:
            kwargs["device"] = torch.device("cpu")
        if func is aten.copy_.default:
            is_far_result = isinstance(args[0], FarTensor)
        elif (
            func is not aten._to_copy.default
            and has_far
            and any(v.dim() and not isinstance(v, FarTensor) for v in tensors)
        ):
            raise RuntimeError(f"{func}: tensors on both devices")
        if has_far and (func in WAITING_OPS or not is_far_result):
            self.wait_names.append(str(func))
            self.stream_calls.append((str(func),))
            if self.raises_on_wait or self.tape is not None:
                raise RuntimeError(f"a synchronizing operation: {func}\nand more")
        args_near, kwargs_near = pytree.tree_map(to_near, (args, kwargs))
        result = self._run_or_record(func, [to_near(v) for v in tensors], args_near, kwargs_near)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **kwargs)  # the claimed shape
        wrapper_of = {id(to_near(v)): v for v in tensors}

        def wrap_far(v):
            return (
                wrapper_of.get(
                    id(v), FarTensor(v) if is_far_result and func is not WAITING_OPS[0] else v
                )
                if isinstance(v, torch.Tensor)
                else v
            )

        return pytree.tree_map(wrap_far, result)

    def _run_or_record(self, func, tensors, args, kwargs):
        if self.tape is None:
            return func(*args, **kwargs)
        values_before = [v.clone() for v in tensors]
        result = func(*args, **kwargs)
        outputs = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
        is_view = outputs and all(any(same_memory(o, v) for v in tensors) for o in outputs)
        if torch.Tag.inplace_view in func.tags or is_view and not func._schema.is_mutable:
            return result
        for v, value_before in zip(tensors, values_before, strict=True):
            copy_into(v, value_before)  # a recording has no effect
        self.tape.append((func, tensors, args, kwargs, outputs))
        return result

    def replay_tape(self, tape):
        """Compute what was recorded, on what the memory holds now."""
        with no_dispatch():
            for func, tensors, args, kwargs, outputs in tape:
                results = [
                    v
                    for v in pytree.tree_leaves(func(*args, **kwargs))
                    if isinstance(v, torch.Tensor)
                ]
                for output, value in zip(outputs, results, strict=True):
                    if not any(same_memory(output, v) for v in tensors):
                        output.copy_(value)


def patch_cuda(machine, monkeypatch):
    """Let those functions of ``torch.cuda`` that record be about ``machine``."""

    class Stream:
        def __init__(self, device=None):
            self.cuda_stream = id(self)

        def wait_stream(self, other):
            machine.stream_calls.append((self, "waits for", other))

    class CUDAGraph:
        def replay(self):
            assert self.stream is None or self.stream is machine.stream  # where it was recorded
            machine.replay_tape(self.tape)

    class graph:
        def __init__(self, graph, pool=None, stream=None):
            self.graph = graph
            graph.stream = stream

        def __enter__(self):
            machine.tape = self.graph.tape = []

        def __exit__(self, error_type, *_):
            machine.tape = None
            if error_type:  # as CUDA says it, while the error itself becomes the context
                raise RuntimeError("operation failed due to a previous error during capture")

    class stream:
        def __init__(self, stream):
            self.inner = stream

        def __enter__(self):
            self.outer, machine.stream = machine.stream, self.inner
            machine.stream_calls.append((self.inner, "computes"))

        def __exit__(self, *_):
            machine.stream = self.outer

    default_stream = machine.stream = Stream()
    machine.stream_calls = []

    fakes = {
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: machine.stream,
        "default_stream": lambda device=None: default_stream,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: setattr(machine, "raises_on_wait", mode == "error"),
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
