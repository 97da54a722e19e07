"""Measure how fast an engine trains on a few batches of every epoch, with throw-away copies."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from ..algorithm import Variables
from .client_streams import AT_ONCE
from .compiled import find_compiler
from .settings import Engine
from .train import ClientFeed, Trainer

_BATCHES, _REPEATS = 2, 3  # batches of every epoch; timed runs after one that warms up
_STACK_SIZES = (10, 25, 50)  # clients per stack
# seconds of training above which compilation is tried, which takes a minute
_WORTH_COMPILING = 3600.0

# a trainer, the initial variables of clients, and the clients that are computed together
Candidate = tuple[Trainer, Variables, Sequence[int]]


class TruncatedFeed:
    """A feed that gives each client at most ``limit`` training samples."""

    def __init__(self, feed: ClientFeed, limit: int) -> None:
        self._feed, self.limit = feed, limit
        self.epoch, self.test_batch, self.test_size, self.unshuffled_batch = (
            feed.epoch,
            feed.test_batch,
            feed.test_size,
            feed.unshuffled_batch,
        )

    def train_size(self, client: int) -> int:
        return min(self.limit, self._feed.train_size(client))


class Speed(NamedTuple):
    """The measured speed of an engine."""

    engine: Engine
    sample_seconds: float  # seconds of training for one sample in one epoch
    compile_seconds: float = 0.0  # seconds of compilation before the first step


def candidate_engines(engine: Engine, max_stack: int, can_stack: bool = True) -> list[Engine]:
    """The engines that ``path: measure`` compares: the loop, on a GPU streams, and stacks of up to
    ``max_stack`` clients, if the network can be stacked.
    """
    requested_size = engine.group_size
    sizes = (
        sorted({min(size, max_stack) for size in _STACK_SIZES} - {1})
        if requested_size == "auto"
        else [requested_size]
    )
    loop = replace(
        engine, path="loop", group_size=1 if requested_size == "auto" else requested_size
    )
    streams = replace(
        engine,
        path="streams",
        group_size=min(AT_ONCE, max_stack) if requested_size == "auto" else requested_size,
    )
    stacks = [replace(engine, path="stack", group_size=size) for size in sizes]
    return [loop] + [streams] * (engine.device == "cuda") + stacks * can_stack


def measure_engines(
    engine: Engine,
    max_stack: int,
    samples: float,
    trainers: Callable[[Engine], Sequence[Candidate]],
    can_stack: bool = True,
) -> list[Speed]:
    """Return the speed of each candidate engine; ``trainers`` gives what to train with an engine.

    samples: of all clients, rounds and epochs. If the run is long enough to repay compilation, the
    fastest engine is also measured with compiled steps.
    """
    speeds = [
        measure_speed(candidate, trainers(candidate))
        for candidate in candidate_engines(engine, max_stack, can_stack)
    ]
    best = fastest_speed(speeds, samples)
    if not engine.compile and samples * best.sample_seconds > _WORTH_COMPILING and find_compiler():
        compiled = replace(best.engine, compile=True)
        with suppress(RuntimeError):  # torch cannot compile every network of a user
            speeds.append(measure_speed(compiled, trainers(compiled)))
    return speeds


def measure_speed(engine: Engine, candidates: Sequence[Candidate]) -> Speed:
    """Return the speed at which ``engine`` trains all ``candidates``."""
    seconds, samples, compile_seconds = 0.0, 0, 0.0
    for trainer, initial, clients in candidates:
        trainer = replace(
            trainer, feed=TruncatedFeed(trainer.feed, _BATCHES * trainer.settings.batch_size)
        )
        rows = {name: v.expand(len(clients), *v.shape) for name, v in initial.personal.items()}
        times = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            for _ in trainer.train(clients, initial.shared, rows, 0):
                pass
            times.append(time.perf_counter() - started)
        best_seconds = min(times[1:])
        seconds, compile_seconds = seconds + best_seconds, compile_seconds + times[0] - best_seconds
        samples += sum(map(trainer.feed.train_size, clients)) * max(1, trainer.settings.epochs)
    return Speed(engine, seconds / samples, compile_seconds)


def fastest_speed(speeds: Sequence[Speed], samples: float) -> Speed:
    """Return the speed with the shortest time for ``samples`` samples; the earlier one of equals.
    The time of compilation counts twice, because every resume compiles again.
    """
    return min(
        speeds,
        key=lambda s: (
            samples * s.sample_seconds + (2 * s.compile_seconds if s.engine.compile else 0.0)
        ),
    )


def summary_line(speeds: Sequence[Speed], selected: Speed) -> str:
    """One line for the user: the speeds and the selected engine."""

    def describe_engine(e):
        at_once = {"stack": f"stacks of {e.group_size}", "streams": f"{e.group_size} streams"}
        path = at_once.get(e.path, e.path)
        return f"{path}, compiled" if e.compile else path

    rates = "; ".join(f"{describe_engine(s.engine)} {1 / s.sample_seconds:,.0f}" for s in speeds)
    taken = describe_engine(selected.engine)
    return f"engine.path = measure: client samples per second: {rates}; taken: {taken}"
