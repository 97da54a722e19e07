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

import torch
from torch import Tensor

from ..algorithm import Phase, Vars
from .compiled import known_as, make_room, parted
from .walk import Epoch, Trainer, Walk, fill, tmap_vars

# recorded phases of a trainer, recorded epochs of a phase; the oldest gives way
_WALKS, _EPOCHS = 16, 32
_STEPS = 100  # batches in one recording: a longer epoch is several


class Again:
    """The stand-in where there is no GPU: plays the step anew. It shows that the fixed memory is
    used rightly.
    """

    def __init__(self, step: Callable[[], None], written: Sequence[Tensor], pool: object) -> None:
        step()
        self.replay = step


class CudaGraph:
    """A step's kernels, recorded on the tensors that it uses; a step writes to ``written`` and
    returns nothing.

    To record it plays it, once. Raises RuntimeError, with ``written`` in any state, when the step
    waits for the GPU, or does what cannot be recorded, or when the recording does not do what the
    step did.
    """

    def __init__(self, step: Callable[[], None], written: Sequence[Tensor], pool: object) -> None:
        before = [v.clone() for v in written]
        self._warm_up(step)
        after = [v.clone() for v in written]
        _restore(written, before)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            step()
        self.replay()
        if not all(_near(v, other) for v, other in zip(written, after, strict=True)):
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


class Graphs:
    """The recordings of a trainer; filled as phases are met."""

    def __init__(self, device: torch.device, graph: type | None = None) -> None:
        self.device = device
        self._graph = graph or (CudaGraph if device.type == "cuda" else Again)
        # with what the key knows by its id, so that it lives on
        self._walks: dict[tuple, tuple[Recorded, list]] = {}
        self._pool: object = None
        self.refused = False

    def walk(self, trainer: Trainer, phase: Phase, start: Vars, now: Vars, clients: int) -> Walk:
        """A ``Walk`` over ``phase`` that trains ``now`` by recordings."""
        if self.refused:
            return Walk(trainer, phase, start, now, clients)
        held: list = []
        key = (
            known_as((phase.steps, phase.constant), held),
            parted((start[:2], now[:2]))[1],
            clients,
        )
        recorded, held = self._walks.pop(key, (None, held))
        if recorded is None:
            recorded = Recorded(
                self, trainer, phase, tmap_vars(_copied, start), tmap_vars(_copied, now), clients
            )
            make_room(self._walks, _WALKS)
        self._walks[key] = recorded, held
        recorded.begin(start, now)
        return recorded

    def record(self, step: Callable[[], None], written: Sequence[Tensor]) -> Again | CudaGraph:
        """Play ``step`` and keep how to play it again."""
        if self.device.type != "cuda":
            return self._graph(step, written, None)
        with torch.cuda.device(self.device):
            # one: nothing in it outlives a replay
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            return self._graph(step, written, self._pool)

    def refuse(self, error: Exception) -> None:
        """Record no more, and tell the user."""
        self.refused = True
        why = str(error).partition("\n")[0]
        print(
            f"hint: engine.graphs: {why}; the steps are played one by one",
            file=sys.stderr,
            flush=True,
        )

    def clear(self) -> None:
        """Give all memory back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._walks.clear()
        self._pool = None


class Recorded(Walk):
    """A ``Walk`` in memory of its own, ``start`` and ``now``, whose epochs are recorded when they
    are met again.
    """

    def __init__(
        self, graphs: Graphs, trainer: Trainer, phase: Phase, start: Vars, now: Vars, clients: int
    ) -> None:
        super().__init__(trainer, phase, start, now, clients)
        self._graphs, self._met, self._epochs = graphs, {}, {}

    def begin(self, start: Vars, now: Vars) -> None:
        """Train these variables from here on."""
        self._outside = now
        self.restart(start, now)

    def end(self) -> None:
        self.copy_to(self._outside)

    def pass_over(self, epoch: Epoch) -> Tensor:
        key = epoch.sizes, id(epoch.store), parted(tuple(epoch.tensors()))[1]
        if self._graphs.refused or key not in self._met:
            make_room(self._met, _EPOCHS)
            self._met[key] = epoch.store  # lives on, as its id is known
            return super().pass_over(epoch)
        if key in self._epochs:
            self._epochs[key] = place = self._epochs.pop(key)
            sums = place.play(epoch)
        else:
            before = [v.clone() for v in self.written]
            try:
                place = _Place(self, self._graphs.record, epoch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _restore(self.written, before)
                self._graphs.refuse(error)
                return super().pass_over(epoch)
            make_room(self._epochs, _EPOCHS)
            self._epochs[key], sums = place, place.sums
        return sums[0] / sums[1]


class _Place:
    """The memory of an epoch, and the recordings that work on it. To make it is to play the epoch."""

    def __init__(self, walk: Walk, record: Callable, epoch: Epoch) -> None:
        self._epoch, self.sums = epoch.each(_copied), epoch.counts.new_zeros(2, len(epoch.sizes))
        firsts, written = walk.firsts(epoch), [*walk.written, self.sums]
        parts = [firsts[at : at + _STEPS] for at in range(0, len(firsts), _STEPS)]
        self._graphs = [
            record(partial(walk.play_over, self._epoch, part, self.sums), written) for part in parts
        ]

    def play(self, epoch: Epoch) -> Tensor:
        """The epoch's sums [2, C], see ``Walk.play_over``."""
        for place, value in zip(self._epoch.tensors(), epoch.tensors(), strict=True):
            fill(place, value)
        epoch.beat()
        self.sums.zero_()
        for graph in self._graphs:
            graph.replay()
        return self.sums


def _copied(v: Tensor) -> Tensor:
    """A copy in the same layout."""
    place = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
    fill(place, v)
    return place


def _restore(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def _near(a: Tensor, b: Tensor) -> bool:
    """Within what kernels may differ by that add up in any order, over the steps of an epoch."""
    return torch.allclose(
        a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()) if b.numel() else 0, equal_nan=True
    )
