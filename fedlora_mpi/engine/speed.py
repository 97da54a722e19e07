"""How fast an engine trains, found by training a few batches of every epoch on throw-away copies."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..algorithm import Vars
from .compiled import compiler
from .settings import Engine
from .train import Trainer

_BATCHES, _REPEATS = 2, 3  # of every epoch; after the first, which warms up
_SIZES = (10, 25, 50)  # of stacks
_LONG = 3600.0  # seconds of training from which compiling, which takes a minute, is tried

# the first variables of clients, and those that compute together
Tried = tuple[Trainer, Vars, Sequence[int]]


class Short:
    """A feed whose clients end after ``limit`` training samples."""

    def __init__(self, feed, limit: int) -> None:
        self._feed, self.limit = feed, limit
        self.epoch, self.test, self.test_size, self.survey = (
            feed.epoch,
            feed.test,
            feed.test_size,
            feed.survey,
        )

    def train_size(self, client: int) -> int:
        return min(self.limit, self._feed.train_size(client))


class Speed(NamedTuple):
    """What an engine showed."""

    engine: Engine
    sample: float  # seconds of training for one sample in one epoch
    start: float = 0.0  # seconds before the first step, of compiling


def candidates(engine: Engine, most: int) -> list[Engine]:
    """The engines that ``path: measure`` compares: one by one, and in stacks of up to ``most``
    clients.
    """
    asked = engine.group_size
    sizes = sorted({min(size, most) for size in _SIZES} - {1}) if asked == "auto" else [asked]
    loop = replace(engine, path="loop", group_size=1 if asked == "auto" else asked)
    return [loop, *(replace(engine, path="stack", group_size=size) for size in sizes)]


def measured(
    engine: Engine, most: int, samples: float, trainers: Callable[[Engine], Sequence[Tried]]
) -> list[Speed]:
    """How fast each candidate is, where ``trainers`` gives what to try of an engine.

    samples: of all clients, rounds and epochs. Where the run is long enough for it to pay, the
    fastest is tried compiled as well.
    """
    speeds = [speed(tried, trainers(tried)) for tried in candidates(engine, most)]
    best = fastest(speeds, samples)
    if not engine.compile and samples * best.sample > _LONG and compiler():
        compiled = replace(best.engine, compile=True)
        speeds.append(speed(compiled, trainers(compiled)))
    return speeds


def speed(engine: Engine, tried: Sequence[Tried]) -> Speed:
    """How fast ``engine`` trains all that is ``tried``."""
    seconds, samples, start = 0.0, 0, 0.0
    for trainer, first, clients in tried:
        trainer = replace(trainer, feed=Short(trainer.feed, _BATCHES * trainer.settings.batch_size))
        rows = {name: v.expand(len(clients), *v.shape) for name, v in first.personal.items()}
        times = []
        for _ in range(1 + _REPEATS):
            begin = time.perf_counter()
            for _ in trainer.train(clients, first.shared, rows, 0):
                pass
            times.append(time.perf_counter() - begin)
        best = min(times[1:])
        seconds, start = seconds + best, start + times[0] - best
        samples += sum(map(trainer.feed.train_size, clients)) * max(1, trainer.settings.epochs)
    return Speed(engine, seconds / samples, start)


def fastest(speeds: Sequence[Speed], samples: float) -> Speed:
    """The one that would be the first to have trained on so many samples; the earlier of equals.
    What compiling took counts twice: every resume pays it again.
    """
    return min(
        speeds, key=lambda s: samples * s.sample + (2 * s.start if s.engine.compile else 0.0)
    )


def told(speeds: Sequence[Speed], chosen: Speed) -> str:
    """One line for the user."""

    def way(e):
        return (
            "loop" if e.path == "loop" else f"stacks of {e.group_size}"
        ) + ", compiled" * e.compile

    each = "; ".join(f"{way(s.engine)} {1 / s.sample:,.0f}" for s in speeds)
    return f"engine.path = measure: client samples per second: {each}; taken: {way(chosen.engine)}"
