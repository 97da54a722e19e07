"""Whole local epochs as recordings: CUDA graphs, which launch all kernels of an epoch at once.

A recording works on fixed memory. So the steps of a phase keep variables of their own, into which
those of a group are copied at the start of the phase and out of which they are copied at its end,
and the order, warps and noise of each epoch are copied into the epoch that was recorded. It serves
every epoch, group and round in which the same steps (by the code of their losses and what these
hold) see clients with as many samples.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithm import Phase, Variables
from .compiled import evict_oldest, identity_key, split_tensors
from .walk import Epoch, PhaseRunner, Trainer, copy_into, tmap_vars

# recorded phases of a trainer, recorded epochs of a phase; the oldest gives way
_MAX_RUNNERS, _MAX_EPOCHS = 16, 32
_BATCHES_PER_GRAPH = 100  # batches in one recording: a longer epoch is several


class EagerGraph:
    """Runs the step again, where there is no GPU; tests the use of the fixed memory."""

    def __init__(
        self, step: Callable[[], None], written_tensors: Sequence[Tensor], pool: Any
    ) -> None:
        step()
        self.replay = step


class CudaGraph:
    """A step's kernels, recorded on the tensors that it uses.

    The step writes to ``written_tensors`` and returns nothing. The constructor runs it once. Raises
    RuntimeError, with ``written_tensors`` in any state, when the step waits for the GPU or cannot
    be recorded, or when the recording gives other results.
    """

    def __init__(
        self, step: Callable[[], None], written_tensors: Sequence[Tensor], pool: Any
    ) -> None:
        initial_values = [v.clone() for v in written_tensors]
        self._warm_up(step)
        expected_values = [v.clone() for v in written_tensors]
        _restore(written_tensors, initial_values)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            step()
        self.replay()
        if not all(
            _is_close(v, expected)
            for v, expected in zip(written_tensors, expected_values, strict=True)
        ):
            raise RuntimeError("a recording gave other numbers than its steps")

    def replay(self) -> None:
        """Play the step on what the tensors hold now."""
        self._graph.replay()

    @staticmethod
    def _warm_up(step: Callable[[], None]) -> None:
        """Play the step on another stream, as a recording is, where a wait for the GPU raises
        RuntimeError.
        """
        stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)


class GraphCache:
    """The recordings of a trainer; filled as phases are met."""

    def __init__(self, device: torch.device, graph_type: type | None = None) -> None:
        self.device = device
        self._graph_type = graph_type or (CudaGraph if device.type == "cuda" else EagerGraph)
        # with the objects that the key knows by their id, so that they live on
        self._runners: dict[tuple, tuple[GraphPhaseRunner, list]] = {}
        self._pool: Any = None  # torch's type for it is private
        self.is_disabled = False

    def runner_for(
        self, trainer: Trainer, phase: Phase, start: Variables, now: Variables, clients: int
    ) -> PhaseRunner:
        """A runner of ``phase`` that trains ``now`` by recordings."""
        if self.is_disabled:
            return PhaseRunner(trainer, phase, start, now, clients)
        kept_alive: list = []
        key = (
            identity_key((phase.steps, phase.constant), kept_alive),
            split_tensors((start[:2], now[:2]))[1],
            clients,
        )
        runner, kept_alive = self._runners.pop(key, (None, kept_alive))
        if runner is None:
            runner = GraphPhaseRunner(
                self,
                trainer,
                phase,
                tmap_vars(_clone_strided, start),
                tmap_vars(_clone_strided, now),
                clients,
            )
            evict_oldest(self._runners, _MAX_RUNNERS)
        self._runners[key] = runner, kept_alive
        runner.begin(start, now)
        return runner

    def record(
        self, step: Callable[[], None], written_tensors: Sequence[Tensor]
    ) -> EagerGraph | CudaGraph:
        """Run ``step``, and record it."""
        if self.device.type != "cuda":
            return self._graph_type(step, written_tensors, None)
        with torch.cuda.device(self.device):
            # one: nothing in it outlives a replay
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            return self._graph_type(step, written_tensors, self._pool)

    def disable(self, error: Exception) -> None:
        """Record nothing more, and tell the user."""
        self.is_disabled = True
        reason = str(error).partition("\n")[0]
        print(
            f"hint: engine.graphs: {reason}; the steps are played one by one",
            file=sys.stderr,
            flush=True,
        )

    def clear(self) -> None:
        """Give all memory back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._runners.clear()
        self._pool = None


class GraphPhaseRunner(PhaseRunner):
    """A ``PhaseRunner`` with its own memory, which records an epoch when it is met again."""

    def __init__(
        self,
        graphs: GraphCache,
        trainer: Trainer,
        phase: Phase,
        start: Variables,
        now: Variables,
        clients: int,
    ) -> None:
        super().__init__(trainer, phase, start, now, clients)
        self._graph_cache = graphs
        self._seen_epochs: dict[tuple, object] = {}  # key -> store
        self._recorded_epochs: dict[tuple, _RecordedEpoch] = {}

    def begin(self, start: Variables, now: Variables) -> None:
        """Train these variables from here on."""
        self._target = now
        self.reset(start, now)

    def end(self) -> None:
        self.copy_to(self._target)

    def run_epoch(self, epoch: Epoch) -> Tensor:
        key = epoch.sizes, id(epoch.store), split_tensors(tuple(epoch.tensors()))[1]
        if self._graph_cache.is_disabled or key not in self._seen_epochs:
            evict_oldest(self._seen_epochs, _MAX_EPOCHS)
            self._seen_epochs[key] = epoch.store  # lives on, as its id is known
            return super().run_epoch(epoch)
        if key in self._recorded_epochs:
            self._recorded_epochs[key] = recorded = self._recorded_epochs.pop(key)
            sums = recorded.replay(epoch)
        else:
            saved_values = [v.clone() for v in self.written_tensors]
            try:
                recorded = _RecordedEpoch(self, self._graph_cache.record, epoch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _restore(self.written_tensors, saved_values)
                self._graph_cache.disable(error)
                return super().run_epoch(epoch)
            evict_oldest(self._recorded_epochs, _MAX_EPOCHS)
            self._recorded_epochs[key], sums = recorded, recorded.sums
        return sums[0] / sums[1]


class _RecordedEpoch:
    """The memory of an epoch, and the recordings that use it. The constructor runs the epoch."""

    def __init__(self, runner: PhaseRunner, record: Callable, epoch: Epoch) -> None:
        self._epoch, self.sums = (
            epoch.map_tensors(_clone_strided),
            epoch.counts.new_zeros(2, len(epoch.sizes)),
        )
        firsts, written_tensors = runner.batch_starts(epoch), [*runner.written_tensors, self.sums]
        parts = [
            firsts[at : at + _BATCHES_PER_GRAPH] for at in range(0, len(firsts), _BATCHES_PER_GRAPH)
        ]
        self._graphs = [
            record(partial(runner.run_batches, self._epoch, part, self.sums), written_tensors)
            for part in parts
        ]

    def replay(self, epoch: Epoch) -> Tensor:
        """The epoch's sums [2, C], see ``PhaseRunner.run_batches``."""
        for target, value in zip(self._epoch.tensors(), epoch.tensors(), strict=True):
            copy_into(target, value)
        epoch.on_batch()
        self.sums.zero_()
        for graph in self._graphs:
            graph.replay()
        return self.sums


def _clone_strided(v: Tensor) -> Tensor:
    """A copy in the same layout."""
    copy = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
    copy_into(copy, v)
    return copy


def _restore(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Within what kernels may differ by that add up in any order, over the steps of an epoch."""
    return torch.allclose(
        a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()) if b.numel() else 0, equal_nan=True
    )
