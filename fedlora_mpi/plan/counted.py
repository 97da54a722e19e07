"""Estimate what a stack costs on a GPU that is not here: operations are counted on this CPU and
priced by the GPU's data sheet.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..core.tree import Tree, nbytes
from ..engine.speed import TruncatedFeed
from ..engine.train import Trainer
from ..federation.clients import ClientType
from .devices import BANDWIDTH_SHARE, CONTEXT_BYTES, PEAK_SHARE, Device
from .line import CostLine, sample_limits

_BATCH_SIZE = 4  # samples of a counted step; costs are linear in the number of samples


class Count(NamedTuple):
    """What the training or evaluation of one client needs."""

    operations: int  # launched kernels
    flops: int  # of matrix products and convolutions
    bytes: int  # read and written by all other operations
    saved: int  # largest number of bytes kept for a backward pass


class GpuSeconds(NamedTuple):
    """Seconds of one stack of clients: the larger of the CPU's time to launch kernels and the GPU's
    time to run them.
    """

    launch: CostLine  # CPU seconds of the whole stack
    compute: CostLine  # GPU seconds of each client

    def cost(self, sizes: Sequence[int], batch_size: int) -> float:
        return max(
            self.launch.cost(sizes, batch_size),
            sum(self.compute.cost([n], batch_size) for n in sizes),
        )


class GpuCosts(NamedTuple):
    """The costs of one client type on a GPU."""

    train: GpuSeconds
    tune: GpuSeconds
    score: GpuSeconds
    client_bytes: float  # bytes of GPU memory per client of a stack during training


def count_gpu_costs(
    client_type: ClientType, client: int, batch_size: int, device: Device, precision: str
) -> GpuCosts:
    """The costs of a client type on ``device``.

    client: a client of this type, whose operations are counted. batch_size: that of the run.
    """
    trainer = client_type.trainer
    feed, settings = (
        TruncatedFeed(trainer.feed, 1),
        replace(trainer.settings, batch_size=_BATCH_SIZE),
    )
    v, samples = client_type.initial, trainer.feed.train_size(client)
    trainer = replace(trainer, feed=feed, settings=settings, stacked=False, step_compiler=None)
    rows = {name: value[None] for name, value in v.personal.items()}

    def count_training(limit: int) -> Count:
        feed.limit = limit
        return _count(lambda: list(trainer.train([client], v.shared, rows, 0)))

    def count_evaluation(limit: int) -> Count:
        feed.limit = limit
        return _count(lambda: trainer.evaluate([client], v.shared, rows))

    operation_seconds = _operation_seconds(trainer, client, v.shared, rows, count_training)

    def price(count):
        return _price_counts(count, samples, operation_seconds, device, precision)

    train, tests = price(count_training), max(1, feed.test_size(client))
    if trainer.algorithm.personalize(trainer.model, settings, 0):
        # ``per_round`` of the tuning includes the scoring
        tune, score = price(count_evaluation), GpuSeconds(CostLine(0, 0, 0), CostLine(0, 0, 0))
    else:
        evaluation = count_evaluation(1)
        tune = GpuSeconds(CostLine(0, 0, 0), CostLine(0, 0, 0))
        score = GpuSeconds(
            CostLine(operation_seconds * evaluation.operations, 0, 0),
            CostLine(0, 0, _gpu_seconds(evaluation, device, precision) / tests),
        )
    half_batch, full_batch, _ = sample_limits(samples, _BATCH_SIZE)
    half_saved, full_saved = count_training(half_batch).saved, count_training(full_batch).saved
    saved = full_saved + max(0, full_saved - half_saved) / max(1, full_batch - half_batch) * (
        min(samples, batch_size) - full_batch
    )
    return GpuCosts(train, tune, score, 4 * (nbytes(v.shared) + nbytes(v.personal)) + saved)


def gpu_capacity(
    device: Device, data_bytes: int, client_bytes: float, group_size: int
) -> tuple[float, int, int]:
    """(bytes of GPU memory per worker, workers that fit on one GPU, clients that one worker alone
    could stack).
    """
    worker_bytes = CONTEXT_BYTES + data_bytes + group_size * client_bytes
    return (
        worker_bytes,
        int(device.memory // worker_bytes),
        max(0, int((device.memory - CONTEXT_BYTES - data_bytes) // client_bytes)),
    )


class _Counter(TorchDispatchMode):
    """Counts the operations, FLOPs and bytes of everything that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        self.operations += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        else:
            tensors = [
                t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, torch.Tensor)
            ]
            self.bytes += sum(t.nbytes for t in {id(t): t for t in tensors}.values())
        return out


def _count(work) -> Count:
    """Return the ``Count`` of ``work()``."""
    peak = held_bytes = 0
    backward = False

    def save_tensor(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held_bytes, peak, backward
        held_bytes, backward = (0 if backward else held_bytes) + tensor.nbytes, False
        peak = max(peak, held_bytes)
        return tensor

    def load_tensor(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal backward
        backward = True
        return tensor

    with saved_tensors_hooks(save_tensor, load_tensor), _Counter() as counter:
        work()
    return Count(counter.operations, counter.flops, counter.bytes, peak)


def _operation_seconds(
    trainer: Trainer, client: int, shared: Tree, rows: Tree, count_training
) -> float:
    """Seconds that this machine needs to start one operation, measured on steps that are too small
    for computation to matter.
    """
    operations = count_training(1).operations
    seconds = []
    for _ in range(3):
        started = time.process_time()
        list(trainer.train([client], shared, rows, 0))
        seconds.append(time.process_time() - started)
    return min(seconds) / operations


def _price_counts(
    count, samples: int, operation_seconds: float, device: Device, precision: str
) -> GpuSeconds:
    """The seconds of a stack whose ``count(limit)`` is the ``Count`` at ``limit`` samples."""
    counts: dict[int, Count] = {
        limit: count(limit) for limit in set(sample_limits(samples, _BATCH_SIZE))
    }

    def fit_line(quantity):
        return CostLine.through(lambda limit: quantity(counts[limit]), 1, samples, _BATCH_SIZE)

    host = fit_line(lambda c: operation_seconds * c.operations)
    return GpuSeconds(
        CostLine(host.per_round, host.per_batch, 0.0),
        fit_line(lambda c: _gpu_seconds(c, device, precision)),
    )


def _gpu_seconds(count: Count, device: Device, precision: str) -> float:
    """Seconds of ``count`` on the GPU: FLOPs at the assumed share of its peak, bytes at the assumed
    share of its memory bandwidth.
    """
    peak = device.tf32 if precision == "tf32" else device.float32
    return count.flops / (PEAK_SHARE * peak) + count.bytes / (BANDWIDTH_SHARE * device.bandwidth)
