"""Choose the device and the path (loop, stack or streams) of a worker."""

import ctypes
import ctypes.util
from typing import Any

import torch

from ..models.network import Model
from .client_streams import AT_ONCE
from .memory import stack_capacity
from .settings import Engine

# FLOP of one client's forward pass over one batch; measured: benchmarks/paths.py
_STACK_MAX_FLOP = 8e6
# clients; with 50 a step is a fifth faster, but only half as many workers have something to do
_STACK_SIZE = 25
_MALLOPT = {-1: 2**30, -2: 2**26, -3: 2**25}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, bytes


def retain_freed_memory() -> None:
    """Tell glibc to keep freed memory between steps. Page faults would cost a CPU step up to a
    third of its time. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def silence_vmap_fallbacks() -> None:
    """Turn off torch's warning that vmap computes an operation for one client after another.

    There is nothing to do about it: a stack is still faster, 2.8 times for an EmbeddingBag (20
    clients, one core).
    """
    # torch declares no such function
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)


def select_device(engine: Engine, worker: int | None) -> torch.device:
    """The device of the ``worker``-th worker of this node (None: a rank that hosts no client).

    The GPUs that CUDA_VISIBLE_DEVICES allows are assigned in turn. Raises ValueError if CUDA is
    requested and not available.
    """
    torch.set_num_threads(engine.threads)
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device = cuda: torch sees no GPU here; engine.device=cpu or auto")
    if engine.device == "cpu" or worker is None or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        engine.precision == "tf32"
    )
    torch.backends.cudnn.deterministic = True  # a resume has the same bits
    device = torch.device("cuda", worker % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def memory_per_worker(device: torch.device, workers: int) -> int:
    """Bytes of GPU memory for each of the ``workers`` of this node; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory // -(
        -workers // torch.cuda.device_count()
    )


def choose_path(
    engine: Engine, device: str, model: Model, batch_size: int, cohort: int, memory: int = 0
) -> tuple[str, int]:
    """Return (path, group size) for ``auto`` without any trial. The result depends only on the
    workload and on a worker's share of GPU ``memory`` (bytes, 0: unknown).

    On a CPU a stack is faster while the number of operations limits a step, and slower once the
    batch of one client keeps a core busy. At most half of the ``cohort`` of a round is computed at
    once, so that two workers have something to do.
    """
    path = engine.path
    if path == "auto":
        small = model.flops * batch_size < _STACK_MAX_FLOP
        path = "stack" if small or device == "cuda" else "loop"
        path = "loop" if engine.gradient_checkpointing else path
    size = engine.group_size
    if size == "auto":
        at_once = {"loop": 1, "streams": AT_ONCE}.get(path, _STACK_SIZE)
        if device == "cuda" and memory and path != "loop":
            capacity = stack_capacity(model, batch_size, memory)
            at_once = min(AT_ONCE, capacity) if path == "streams" else capacity
        half_cohort = max(1, -(-cohort // 2))
        return path, min(at_once, half_cohort)
    return path, size
