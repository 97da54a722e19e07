"""A little of a round on throw-away copies before it counts: whether a user's network and method
train at all, and whether a stack of clients gives what they give one by one.

``torch.func.vmap`` knows no rule for recurrent layers, packed sequences, ``.item()`` or control
flow that depends on data, and some operations, such as an embedding with ``padding_idx``, have
other gradients under it.
"""

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..algorithm import Phase, Vars
from ..core.batch import Batch
from ..core.tree import Tree, numel, tmap
from ..models.network import Model
from .settings import Engine
from .train import Trainer
from .walk import Epoch, tmap_vars

_BATCH = 8  # training samples of a step, at most
_TESTS = 5, 3
_LARGE = 2**24  # numbers of a client of which no copies in double precision are made
# Of the largest step of a leaf, by the least precise of all leaves; losses are float32.
_NEAR = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 3e-1, torch.float16: 1e-1}
_TEXT = 160  # letters of torch's message that are told


class Objection(NamedTuple):
    """Why clients cannot train in a stack."""

    reason: str
    fails: bool  # a stacked step raises; else it gives other numbers


def objection(trainer: Trainer, first: Vars) -> Objection | None:
    """Why clients with the variables ``first`` in round 1 are to train one by one; None: a stack
    gives the same.

    Raises ValueError when not even one client alone trains.
    """
    if trainer.model.couples:
        found = _compared(trainer, first, torch.float32)
        across = Objection(
            "computes across the examples of a batch, where padding would enter", fails=False
        )
        return found if found and found.fails else across
    large = numel(first.shared) + numel(first.personal) > _LARGE
    for dtype in (
        (torch.float32,)
        if large or _least_precise(first) != torch.float32
        else (torch.float64, torch.float32)
    ):
        found = _compared(trainer, first, dtype)
        if not (found and found.fails):  # a module may know one precision only
            return found
    return found


def rehearsed(engine: Engine, asked: Engine, tried: Sequence[tuple[str, Trainer, Vars]]) -> Engine:
    """``engine``, or the loop where a network of those ``tried`` wants it, with a hint to the user.

    asked: as the config has it; tried: networks by name, who trains them and with which variables
    in round 1. Raises ValueError where not even the loop trains, or where a stack was asked for
    that cannot.
    """
    for name, trainer, first in tried:
        try:
            found = alone(trainer, first) if engine.path == "loop" else objection(trainer, first)
        except ValueError as error:
            raise ValueError(f"model.name = {name}: {error}") from error.__cause__
        if found is None:
            continue
        if found.fails and asked.path == "stack":
            raise ValueError(f"engine.path = stack: {name} {found.reason}; choose auto or loop")
        although = ", although a stack was asked for" if asked.path == "stack" else ""
        print(
            f"hint: engine.path = {asked.path}: {name} {found.reason}; clients train one by "
            f"one{although} (engine.path=loop says so from the start)",
            file=sys.stderr,
            flush=True,
        )
        return replace(
            engine, path="loop", group_size=1 if asked.group_size == "auto" else asked.group_size
        )
    return engine


def alone(trainer: Trainer, first: Vars) -> None:
    """Train and evaluate one client a little. Raises ValueError where that fails."""
    size = min(_BATCH, trainer.settings.batch_size)
    try:
        _outcome(_made(trainer, (size, size), (1, 1), torch.float32, stacked=False), first, [0])
    except Exception as error:  # a user's module may raise anything
        raise _failed(error) from error


def said(error: Exception) -> str:
    """An error as a part of a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _TEXT else f'{text[:_TEXT]} ...'}"


def _least_precise(v: Vars) -> torch.dtype:
    """The type of the leaves with the fewest digits."""
    kinds = {leaf.dtype for half in v[:2] for leaf in half.values() if leaf.is_floating_point()}
    return min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)


def _precise(v: Tensor, dtype: torch.dtype) -> Tensor:
    """``v`` in double precision where that is asked for, else as it is."""
    return v.double() if dtype == torch.float64 and v.is_floating_point() else v


def _compared(trainer: Trainer, first: Vars, dtype: torch.dtype) -> Objection | None:
    """What ``objection`` says by steps in double precision, or by those of a run."""
    batch_size = min(_BATCH, trainer.settings.batch_size)
    sizes = 2 * batch_size, max(1, batch_size - 2)  # the second client's batch is padded
    first = tmap_vars(lambda v: _precise(v, dtype), first)
    loop, stack = (_made(trainer, sizes, _TESTS, dtype, stacked) for stacked in (False, True))
    try:
        apart = _outcome(loop, first, [0, 1])
    except Exception as error:
        if dtype == torch.float32:
            raise _failed(error) from error
        return Objection(f"knows no double precision ({said(error)})", fails=True)
    try:
        together = _outcome(stack, first, [0, 1])
    except Exception as error:
        return Objection(f"cannot train in a stack ({said(error)})", fails=True)
    if apart.like(together, _NEAR[_least_precise(first)]):
        return None
    return Objection("has other gradients or results in a stack than one by one", fails=False)


def _failed(error: Exception) -> ValueError:
    return ValueError(f"one step of local training fails: {said(error)}")


class _Once(Trainer):
    """Plays one epoch of every phase."""

    def phases(self, round_: int) -> Sequence[Phase]:
        return [phase._replace(epochs=min(1, phase.epochs)) for phase in super().phases(round_)]

    def tuning(self, round_: int) -> Sequence[Phase]:
        return [phase._replace(epochs=min(1, phase.epochs)) for phase in super().tuning(round_)]


def _made(
    trainer: Trainer,
    sizes: tuple[int, int],
    tests: tuple[int, int],
    dtype: torch.dtype,
    stacked: bool,
) -> Trainer:
    """A trainer of two clients with so many samples, whose steps leave no trace."""
    settings = replace(trainer.settings, batch_size=min(_BATCH, trainer.settings.batch_size))
    feed = _Cast(trainer.feed.of_two(sizes, tests), dtype)
    model = _apart(trainer.model, dtype)
    return _Once(trainer.algorithm, model, settings, feed, trainer.device, stacked)


def _apart(model: Model, dtype: torch.dtype) -> Model:
    """The network in this precision; what its modules remember of a pass is thrown away with it."""
    modules, bodies = copy.deepcopy((model.modules, model.bodies))
    initial = tmap(lambda v: _precise(v, dtype), model.initial)
    return replace(model, initial=initial, modules=modules, bodies=bodies)


class _Outcome(NamedTuple):
    """What clients have learned, and how they are judged."""

    moved: list[Tensor]  # of each client and leaf, from the start to the end
    sizes: list[float]  # of the numbers in it
    losses: list[Tensor]

    def like(self, other: "_Outcome", near: float) -> bool:
        """Whether two are equal but for last bits. A leaf whose gradient is zero has nothing but
        such.
        """
        least = 1e-3 * max(map(_largest, self.moved), default=0.0)
        for a, b, size in zip(self.moved, other.moved, self.sizes, strict=True):
            atol = near * max(_largest(a), least, 1e-5 * size)
            if not torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True):
                return False
        pairs = zip(self.losses, other.losses, strict=True)
        return all(
            torch.allclose(a.double(), b.double(), rtol=near, atol=near, equal_nan=True)
            for a, b in pairs
        )


def _outcome(trainer: Trainer, first: Vars, clients: Sequence[int]) -> _Outcome:
    """What these clients make of a round that begins with ``first``."""
    rows = {name: v.expand(len(clients), *v.shape).clone() for name, v in first.personal.items()}
    shared, found = tmap(torch.clone, first.shared), _Outcome([], [], [])
    with warnings.catch_warnings(), _whole_products():
        warnings.simplefilter("ignore")
        for done in trainer.train(clients, shared, rows, 0, evaluate=True):
            for start, end in zip(done.start[:2], done.end[:2], strict=True):
                found.moved.extend(
                    end[n].detach().double() - start[n].double() for n in end if n in start
                )
                found.sizes.extend(_largest(start[n].double()) for n in end if n in start)
            found.losses.extend((done.loss, done.score[1]))
        found.losses.append(trainer.evaluate(clients, shared, rows)[:, 1])
    return found


@contextmanager
def _whole_products() -> Iterator[None]:
    """Without tf32, whose rounding would hide what differs."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


def _largest(v: Tensor) -> float:
    """The largest finite magnitude."""
    return float(v.nan_to_num(0.0, 0.0, 0.0).abs().max()) if v.numel() else 0.0


class _Cast:
    """A feed whose inputs have another precision."""

    def __init__(self, feed, dtype: torch.dtype) -> None:
        self._feed, self._dtype = feed, dtype
        self.train_size, self.test_size = feed.train_size, feed.test_size

    def epoch(self, *given) -> Epoch:
        epoch = self._feed.epoch(*given)
        return replace(epoch, store=_Store(epoch.store, self._dtype))

    def test(self, *given) -> Batch:
        return self._cast(self._feed.test(*given))

    def survey(self, clients: Sequence[int], whole: bool) -> Batch:
        return self._cast(self._feed.survey(clients, whole))

    def _cast(self, batch: Batch) -> Batch:
        return batch._replace(x=_precise(batch.x, self._dtype))


class _Store:
    """A store whose inputs have another precision."""

    def __init__(self, store, dtype: torch.dtype) -> None:
        self._store, self._dtype, self.numbers = store, dtype, store.numbers

    def read(self, rows: Tensor, warps: Tree) -> tuple[Tensor, Tensor]:
        x, y = self._store.read(rows, warps)
        return _precise(x, self._dtype), y
