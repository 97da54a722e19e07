"""What a stack would cost on a GPU that is not here: its operations counted on this CPU, priced by
the data sheet.
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
from ..engine.speed import Short
from ..engine.train import Trainer
from ..federation.federation import Kind
from .devices import CONTEXT, OF_BANDWIDTH, OF_PEAK, Device
from .line import Line, limits

_BATCH = 4  # samples of a step that is counted; costs are linear in them


class Count(NamedTuple):
    """What one client's training or evaluation does."""

    operations: int  # kernels that are started
    flops: int  # of products and convolutions
    bytes: int  # that all others read and write
    saved: int  # bytes kept for a backward pass, at most


class OnGpu(NamedTuple):
    """Seconds of clients in one stack: of the processor that starts kernels, or of the GPU,
    whichever is more.
    """

    host: Line  # of a stack
    gpu: Line  # of each client

    def of(self, sizes: Sequence[int], batch_size: int) -> float:
        return max(
            self.host.of(sizes, batch_size), sum(self.gpu.of([n], batch_size) for n in sizes)
        )


class Counted(NamedTuple):
    """A kind of clients on a GPU."""

    train: OnGpu
    tune: OnGpu
    score: OnGpu
    client: float  # bytes of GPU memory of each client of a stack while it trains


def counted(kind: Kind, client: int, batch_size: int, device: Device, precision: str) -> Counted:
    """The costs of clients of a kind on ``device``; ``client``: one of them. ``batch_size``: that
    of the run.
    """
    trainer = kind.trainer
    feed, settings = Short(trainer.feed, 1), replace(trainer.settings, batch_size=_BATCH)
    v, samples = kind.first, trainer.feed.train_size(client)
    trainer = replace(trainer, feed=feed, settings=settings, stacked=False, compiled=None)
    rows = {name: value[None] for name, value in v.personal.items()}

    def trained(limit: int) -> Count:
        feed.limit = limit
        return _count(lambda: list(trainer.train([client], v.shared, rows, 0)))

    def judged(limit: int) -> Count:
        feed.limit = limit
        return _count(lambda: trainer.evaluate([client], v.shared, rows))

    each = _each_operation(trainer, client, v.shared, rows, trained)

    def priced(count):
        return _priced(count, samples, each, device, precision)

    train, tests = priced(trained), max(1, feed.test_size(client))
    if trainer.algorithm.tune(trainer.model, settings, 0):
        # the tuning's ``once`` has it
        tune, score = priced(judged), OnGpu(Line(0, 0, 0), Line(0, 0, 0))
    else:
        one = judged(1)
        tune = OnGpu(Line(0, 0, 0), Line(0, 0, 0))
        score = OnGpu(
            Line(each * one.operations, 0, 0), Line(0, 0, _seconds(one, device, precision) / tests)
        )
    few, full, _ = limits(samples, _BATCH)
    low, high = trained(few).saved, trained(full).saved
    saved = high + max(0, high - low) / max(1, full - few) * (min(samples, batch_size) - full)
    return Counted(train, tune, score, 4 * (nbytes(v.shared) + nbytes(v.personal)) + saved)


def fits(device: Device, data: int, client: float, group_size: int) -> tuple[float, int, int]:
    """(bytes of GPU memory of a worker, workers that fit on one, clients that one worker could
    stack).
    """
    own = CONTEXT + data + group_size * client
    return own, int(device.memory // own), max(0, int((device.memory - CONTEXT - data) // client))


class _Counter(TorchDispatchMode):
    """Adds up what is done under it."""

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
    """What ``work()`` does."""
    peak = now = 0
    backward = False

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal now, peak, backward
        now, backward = (0 if backward else now) + tensor.nbytes, False
        peak = max(peak, now)
        return tensor

    def use(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal backward
        backward = True
        return tensor

    with saved_tensors_hooks(keep, use), _Counter() as counter:
        work()
    return Count(counter.operations, counter.flops, counter.bytes, peak)


def _each_operation(trainer: Trainer, client: int, shared: Tree, rows: Tree, trained) -> float:
    """Seconds in which this machine starts an operation: of steps so small that they hardly
    compute.
    """
    operations = trained(1).operations
    taken = []
    for _ in range(3):
        begin = time.process_time()
        list(trainer.train([client], shared, rows, 0))
        taken.append(time.process_time() - begin)
    return min(taken) / operations


def _priced(count, samples: int, each: float, device: Device, precision: str) -> OnGpu:
    """The seconds of what ``count(limit)`` counts."""
    counts: dict[int, Count] = {limit: count(limit) for limit in set(limits(samples, _BATCH))}

    def line(of):
        return Line.through(lambda limit: of(counts[limit]), 1, samples, _BATCH)

    host = line(lambda c: each * c.operations)
    return OnGpu(Line(host.once, host.batch, 0.0), line(lambda c: _seconds(c, device, precision)))


def _seconds(count: Count, device: Device, precision: str) -> float:
    """Of the GPU: products at its peak, the rest at its memory's speed, as far as each is reached."""
    peak = device.tf32 if precision == "tf32" else device.float32
    return count.flops / (OF_PEAK * peak) + count.bytes / (OF_BANDWIDTH * device.bandwidth)
