"""Measures how fast an engine trains: a few batches of every epoch, on throw-away copies."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..algorithm import Variables
from .compiled import find_compiler
from .settings import Engine
from .train import ClientFeed, Trainer

_BATCHES, _REPEATS = 2, 3  # of every epoch; after the first, which warms up
_STACK_SIZES = (10, 25, 50)  # of stacks
# seconds of training from which compiling, which takes a minute, is tried
_WORTH_COMPILING = 3600.0

# the first variables of clients, and those that compute together
Candidate = tuple[Trainer, Variables, Sequence[int]]


class TruncatedFeed:
    """A feed whose clients end after ``limit`` training samples."""

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
    """What an engine showed."""

    engine: Engine
    sample_seconds: float  # seconds of training for one sample in one epoch
    compile_seconds: float = 0.0  # seconds before the first step, of compiling


def candidate_engines(engine: Engine, max_stack: int) -> list[Engine]:
    """The engines that ``path: measure`` compares: one by one, and in stacks of up to ``max_stack``
    clients.
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
    return [loop, *(replace(engine, path="stack", group_size=size) for size in sizes)]


def measure_engines(
    engine: Engine,
    max_stack: int,
    samples: float,
    trainers: Callable[[Engine], Sequence[Candidate]],
) -> list[Speed]:
    """How fast each candidate is, where ``trainers`` gives what to try of an engine.

    samples: of all clients, rounds and epochs. Where the run is long enough for it to pay, the
    fastest is tried compiled as well.
    """
    speeds = [
        measure_speed(candidate, trainers(candidate))
        for candidate in candidate_engines(engine, max_stack)
    ]
    best = fastest_speed(speeds, samples)
    if not engine.compile and samples * best.sample_seconds > _WORTH_COMPILING and find_compiler():
        compiled = replace(best.engine, compile=True)
        speeds.append(measure_speed(compiled, trainers(compiled)))
    return speeds


def measure_speed(engine: Engine, candidates: Sequence[Candidate]) -> Speed:
    """How fast ``engine`` trains all ``candidates``."""
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
    """The one that would be the first to have trained on so many samples; the earlier of equals.
    What compiling took counts twice: every resume pays it again.
    """
    return min(
        speeds,
        key=lambda s: (
            samples * s.sample_seconds + (2 * s.compile_seconds if s.engine.compile else 0.0)
        ),
    )


def summary_line(speeds: Sequence[Speed], selected: Speed) -> str:
    """One line for the user."""

    def describe_engine(e):
        path = "loop" if e.path == "loop" else f"stacks of {e.group_size}"
        return f"{path}, compiled" if e.compile else path

    rates = "; ".join(f"{describe_engine(s.engine)} {1 / s.sample_seconds:,.0f}" for s in speeds)
    taken = describe_engine(selected.engine)
    return f"engine.path = measure: client samples per second: {rates}; taken: {taken}"
