"""Record whole local epochs as CUDA graphs, which launch all kernels of an epoch at once.

A recording works on fixed memory. The steps of a phase therefore own variables: a group's variables
are copied into them at the start of the phase and copied out at its end. The order, warps and noise
of each epoch are copied into the recorded epoch. A recording serves every epoch, group and round
with the same steps (the same code of the losses and the same values that they hold) and the same
numbers of samples. It belongs to the stream on which it was made: recordings of two streams, which
may run at the same time, share no memory.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithm import Phase, Variables
from .compiled import evict_oldest, identity_key, split_tensors
from .memory import is_memory_error
from .walk import Epoch, PhaseRunner, Trainer, copy_all, copy_into, tmap_vars

_MAX_RUNNERS = 16  # recorded phases per trainer and stream; the oldest is dropped
# Recorded epochs per phase. Further ones run step by step: if the oldest gave way, clients of many
# sizes would be recorded again and again.
_MAX_EPOCHS = 128
_MAX_SEEN = 1024  # epochs per phase that are remembered until they come again
_BATCHES_PER_GRAPH = 100  # batches in one recording; a longer epoch takes several recordings


class EagerGraph:
    """A replacement for ``CudaGraph`` without a GPU. It runs the step at every replay, which tests
    the use of fixed memory.
    """

    def __init__(
        self, step: Callable[[], None], written_tensors: Sequence[Tensor], pool: Any
    ) -> None:
        step()
        self.replay = step


class CudaGraph:
    """The kernels of a step, recorded on the tensors that it uses.

    The step writes to ``written_tensors`` and returns nothing. The constructor leaves
    ``written_tensors`` as after one step. It raises RuntimeError if the step waits for the GPU, if
    it cannot be recorded, or if the recording gives other results; ``written_tensors`` are then
    undefined.
    """

    def __init__(
        self, step: Callable[[], None], written_tensors: Sequence[Tensor], pool: Any
    ) -> None:
        initial_values = [v.clone() for v in written_tensors]
        self._warm_up(step)
        expected_values = [v.clone() for v in written_tensors]
        _restore(written_tensors, initial_values)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool, stream=_side_stream()):
                step()
        except RuntimeError:
            _leave_pool(written_tensors[0].device, pool)
            raise
        self.replay()
        if not all(
            _is_close(v, expected)
            for v, expected in zip(written_tensors, expected_values, strict=True)
        ):
            raise RuntimeError("a recording gave other numbers than its steps")

    def replay(self) -> None:
        """Run the step on the current values of the tensors."""
        self._graph.replay()

    @staticmethod
    def _warm_up(step: Callable[[], None]) -> None:
        """Run the step on another stream, as a recording does. Waiting for the GPU raises
        RuntimeError there.
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
    """The recordings of a trainer; it is filled while phases run."""

    def __init__(self, device: torch.device, graph_type: type | None = None) -> None:
        self.device = device
        self._graph_type = graph_type or (CudaGraph if device.type == "cuda" else EagerGraph)
        # of each stream; each runner with the objects that its key knows by id, to keep them alive
        self._runners: dict[int, dict[tuple, tuple[GraphPhaseRunner, list]]] = {}
        self._pools: dict[int, Any] = {}  # torch's type for a pool is private
        self.is_disabled = False
        self._hints: set[str] = set()

    def runner_for(
        self, trainer: Trainer, phase: Phase, start: Variables, now: Variables, clients: int
    ) -> PhaseRunner:
        """Return a runner of ``phase`` that trains ``now`` by recordings."""
        if self.is_disabled:
            return PhaseRunner(trainer, phase, start, now, clients)
        kept_alive: list = []
        key = (
            identity_key((phase.steps, phase.constant), kept_alive),
            split_tensors((start[:2], now[:2]))[1],
            clients,
        )
        runners = self._runners.setdefault(self._stream_id(), {})
        runner, kept_alive = runners.pop(key, (None, kept_alive))
        if runner is None:
            runner = GraphPhaseRunner(
                self,
                trainer,
                phase,
                tmap_vars(_clone_strided, start),
                tmap_vars(_clone_strided, now),
                clients,
            )
            evict_oldest(runners, _MAX_RUNNERS)
        runners[key] = runner, kept_alive
        runner.begin(start, now)
        return runner

    def record(
        self, step: Callable[[], None], written_tensors: Sequence[Tensor]
    ) -> EagerGraph | CudaGraph:
        """Run ``step`` once and return its recording."""
        if self.device.type != "cuda":
            return self._graph_type(step, written_tensors, None)
        with torch.cuda.device(self.device):
            # one pool for all recordings of a stream, because nothing in it outlives a replay
            stream_id = self._stream_id()
            if stream_id not in self._pools:
                self._pools[stream_id] = torch.cuda.graph_pool_handle()
            return self._graph_type(step, written_tensors, self._pools[stream_id])

    def disable(self, error: Exception) -> None:
        """Record nothing from here on, and tell the user why."""
        self.is_disabled = True
        reason = str(_first_error(error)).partition("\n")[0]
        self.hint(f"{reason}; the steps are played one by one")

    def hint(self, text: str) -> None:
        """Print a hint about ``engine.graphs``, once."""
        if text not in self._hints:
            self._hints.add(text)
            print(f"hint: engine.graphs: {text}", file=sys.stderr, flush=True)

    def recorded_epochs(self) -> int:
        """The number of recordings."""
        return sum(
            len(runner.recorded)
            for runners in self._runners.values()
            for runner, _ in runners.values()
        )

    def clear(self) -> None:
        """Free all memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._runners.clear()
        self._pools.clear()

    def _stream_id(self) -> int:
        """A number of the current stream of the GPU; without a GPU there is one stream."""
        if self.device.type == "cpu":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream


class GraphPhaseRunner(PhaseRunner):
    """A ``PhaseRunner`` with its own memory. It records an epoch when it meets it again."""

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
        self.recorded: dict[tuple, _RecordedEpoch] = {}

    def begin(self, start: Variables, now: Variables) -> None:
        """Train the variables ``now`` until ``end``."""
        self._target = now
        self.reset(start, now)

    def end(self) -> None:
        self.copy_to(self._target)

    def run_epoch(self, epoch: Epoch) -> Tensor:
        key = epoch.sizes, id(epoch.store), split_tensors(tuple(epoch.tensors()))[1]
        if key in self.recorded:
            sums = self.recorded[key].replay(epoch)
        elif self._can_record(key):
            saved_values = [v.clone() for v in self.written_tensors]
            try:
                recorded = _RecordedEpoch(self, self._graph_cache.record, epoch)
            except RuntimeError as error:
                if is_memory_error(error):
                    raise
                _restore(self.written_tensors, saved_values)
                self._graph_cache.disable(error)
                return super().run_epoch(epoch)
            self.recorded[key], sums = recorded, recorded.sums
        else:
            self._remember(key, epoch)
            return super().run_epoch(epoch)
        return sums[0] / sums[1]

    def _can_record(self, key: tuple) -> bool:
        """Whether this is the second epoch of its kind, and there is room for its recording."""
        if self._graph_cache.is_disabled or key not in self._seen_epochs:
            return False
        if len(self.recorded) < _MAX_EPOCHS:
            return True
        self._graph_cache.hint(
            f"clients have more than {_MAX_EPOCHS} different numbers of samples; the steps of the "
            "others are played one by one"
        )
        return False

    def _remember(self, key: tuple, epoch: Epoch) -> None:
        """Note that such an epoch has run."""
        if len(self._seen_epochs) == _MAX_SEEN and not self.recorded:
            self._graph_cache.hint(
                f"of {_MAX_SEEN} epochs no two had clients with the same numbers of samples, so "
                "none is recorded; engine.path=loop or a smaller engine.group_size may repeat some"
            )
        self._seen_epochs.pop(key, None)
        evict_oldest(self._seen_epochs, _MAX_SEEN)
        self._seen_epochs[key] = epoch.store  # kept alive, because the key has its id


class _RecordedEpoch:
    """The memory of an epoch and the recordings that use it. The constructor runs the epoch."""

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
        """Run the recording on ``epoch`` and return its sums [2, C], see
        ``PhaseRunner.run_batches``.
        """
        copy_all(zip(self._epoch.tensors(), epoch.tensors(), strict=True))
        epoch.on_batch()
        self.sums.zero_()
        for graph in self._graphs:
            graph.replay()
        return self.sums


def _side_stream() -> Any:
    """The current stream, or None for the default one, on which nothing can be recorded.

    Libraries keep working memory for each stream on which they are recorded, so recordings that may
    run at the same time are made on streams of their own.
    """
    current = torch.cuda.current_stream()
    return None if current == torch.cuda.default_stream() else current


def _clone_strided(v: Tensor) -> Tensor:
    """Return a copy in the same layout."""
    copy = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
    copy_into(copy, v)
    return copy


def _restore(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _first_error(error: BaseException) -> BaseException:
    """The error from which the others came: leaving a failed recording raises another one."""
    while earlier := error.__cause__ or error.__context__:
        error = earlier
    return error


def _leave_pool(device: torch.device, pool: Any) -> None:
    """Tell torch's allocator that a recording into ``pool`` that failed is over.

    torch before 2.12 forgets to, and stops the process when memory is freed later
    (https://github.com/pytorch/pytorch/pull/180395). Later versions have nothing left to do.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None:
        return
    with suppress(RuntimeError):  # the recording has left the pool
        end(device.index, pool)


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` and ``b`` differ by no more than kernels that add in any order do over one
    epoch.
    """
    if not b.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(
        a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()) if b.numel() else 0, equal_nan=True
    )
