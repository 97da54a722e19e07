"""Estimate what a stack costs on a GPU that is not here: operations are counted on this CPU and
priced by the GPU's data sheet.
"""

import time
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..core.tree import Tree, nbytes, storage_key
from ..engine.speed import TruncatedFeed
from ..engine.train import Trainer
from ..engine.walk import tmap_vars
from ..federation.clients import ClientType
from .devices import BANDWIDTH_SHARE, CONTEXT_BYTES, PEAK_SHARE, Device
from .line import CostLine, sample_limits

_META = torch.device("meta")
_BATCH_SIZE = 4  # samples of a counted step; costs are linear in the number of samples


class Count(NamedTuple):
    """What the training or evaluation of one client needs."""

    operations: int  # launched kernels
    flops: int  # of matrix products and convolutions
    bytes: int  # read and written by all other operations
    peak: int  # largest number of bytes of all tensors that it makes, alive at the same time


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
    # bytes of GPU memory per client of a stack during training, beside the network itself
    client_bytes: float


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
    trainer = replace(
        trainer, feed=feed, settings=settings, stacked=False, step_compiler=None, streams=None
    )
    if trainer.model.is_without_values:
        trainer = replace(trainer, device=_META)
        v = tmap_vars(lambda value: value.to(_META), v)
    rows = {name: value[None] for name, value in v.personal.items()}

    @cache
    def count_training(limit: int) -> Count:
        feed.limit = limit
        return _count(lambda: list(trainer.train([client], v.shared, rows, 0)))

    @cache
    def count_evaluation(limit: int) -> Count:
        feed.limit = limit
        return _count(lambda: trainer.evaluate([client], v.shared, rows))

    list(trainer.train([client], v.shared, rows, 0))  # the first call fills caches
    if trainer.model.is_without_values:
        operation_seconds = _seconds_of_small_operation()
    else:
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
    half_peak, full_peak = count_training(half_batch).peak, count_training(full_batch).peak
    peak = full_peak + max(0, full_peak - half_peak) / max(1, full_batch - half_batch) * (
        min(samples, batch_size) - full_batch
    )
    # what the client receives is on the device, too
    return GpuCosts(train, tune, score, nbytes(v.shared) + nbytes(v.personal) + peak)


def gpu_capacity(
    device: Device, common_bytes: float, client_bytes: float, group_size: int
) -> tuple[float, int, int]:
    """(bytes of GPU memory per worker, workers that fit on one GPU, clients that one worker alone
    could stack).

    common_bytes: of a worker's data and networks, which its clients share, and of the personal
    leaves that it keeps there.
    """
    worker_bytes = CONTEXT_BYTES + common_bytes + group_size * client_bytes
    return (
        worker_bytes,
        int(device.memory // worker_bytes),
        max(0, int((device.memory - CONTEXT_BYTES - common_bytes) // client_bytes)),
    )


class _Counter(TorchDispatchMode):
    """Counts the operations, FLOPs and bytes of everything that runs inside it, and the memory of
    the tensors that it makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = self.bytes = self.peak = 0
        self._alive: dict[int, int] = {}  # bytes by place in memory
        self._alive_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        self.operations += 1
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        else:
            self.bytes += sum(t.nbytes for t in {id(t): t for t in (*inputs, *outputs)}.values())
        known = {storage_key(t) for t in inputs}
        for tensor in outputs:
            self._note_memory(tensor, known)
        return out

    def _note_memory(self, tensor: Tensor, known: Collection[int]) -> None:
        """Count the memory of ``tensor`` until it is freed, unless an operation has only written to
        it.
        """
        place, memory = storage_key(tensor), tensor.untyped_storage()
        if place in known or place in self._alive or not memory.nbytes():
            return
        self._alive[place] = memory.nbytes()
        self._alive_bytes += memory.nbytes()
        self.peak = max(self.peak, self._alive_bytes)
        weakref.finalize(memory, self._forget_memory, place).atexit = False

    def _forget_memory(self, place: int) -> None:
        self._alive_bytes -= self._alive.pop(place)


def _count(work: Callable[[], object]) -> Count:
    """Return the ``Count`` of ``work()``."""
    with _Counter() as counter:
        work()
    return Count(counter.operations, counter.flops, counter.bytes, counter.peak)


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


def _seconds_of_small_operation() -> float:
    """Seconds that this machine needs to start one operation, measured on a small network."""
    network = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.ReLU())))
    x, optimizer = torch.ones(4, 8), torch.optim.SGD(network.parameters(), 0.0, foreach=False)

    def step() -> None:
        optimizer.zero_grad()
        network(x).sum().backward()
        optimizer.step()

    operations, seconds = _count(step).operations, []
    for _ in range(20):
        started = time.process_time()
        step()
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
