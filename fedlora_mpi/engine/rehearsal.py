"""Rehearse a small part of a round on throw-away copies before a run starts.

The rehearsal checks that a user's network and method train at all, and that a stack of clients
gives the same results as clients one by one. ``torch.func.vmap`` has no rule for recurrent layers,
packed sequences, ``.item()`` or control flow that depends on data. Some operations, such as an
embedding with ``padding_idx``, have other gradients under it.
"""

import copy
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..algorithm import Phase, Variables, Visit
from ..core.batch import Batch
from ..core.losses import CROSS_ENTROPY
from ..core.tree import Tree, numel, tmap
from ..data.feed import Feed
from ..models.network import Model
from ..models.zoo import is_external
from .compiled import StepCompiler
from .method_guard import MethodMistake, guard_items, is_package_method, need_layout
from .settings import Engine
from .train import Trainer
from .walk import Epoch, tmap_vars

_BATCH_SIZE = 8  # largest number of training samples in a step
_TEST_SIZES = 5, 3
_MAX_DOUBLE_NUMEL = 2**24  # a client with more numbers is not copied in double precision
# relative to the largest change of a leaf, by the lowest precision of all leaves; losses are
# float32
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 3e-1, torch.float16: 1e-1}
_MAX_TEXT = 160  # characters of torch's message that are printed


class Objection(NamedTuple):
    """The reason why clients cannot train in a stack."""

    reason: str
    raises: bool  # whether a stacked step raises an error; if not, it gives other numbers


def find_objection(trainer: Trainer, initial: Variables) -> Objection | None:
    """Return why clients with the variables ``initial`` must train one by one; None if a stack
    gives the same results.

    Raises ValueError if not even one client alone trains.
    """
    if trainer.model.couples:
        verdict = _compare_paths(trainer, initial, torch.float32)
        coupling = Objection(
            "computes across the examples of a batch, where padding would enter", raises=False
        )
        return verdict if verdict and verdict.raises else coupling
    is_large = numel(initial.shared) + numel(initial.personal) > _MAX_DOUBLE_NUMEL
    for dtype in (
        (torch.float32,)
        if is_large or _lowest_precision(initial) != torch.float32
        else (torch.float64, torch.float32)
    ):
        verdict = _compare_paths(trainer, initial, dtype)
        if not (verdict and verdict.raises):  # a module may support only one precision
            return verdict
    return verdict


def rehearse_engine(
    engine: Engine,
    requested: Engine,
    candidates: Sequence[tuple[str, Trainer, Variables]],
    method: str,
    loss: str = CROSS_ENTROPY.name,
) -> Engine:
    """Return ``engine``, or the loop with a hint to the user if one of the ``candidates`` needs it.

    requested: the engine of the config; candidates: name, trainer and variables in round 1 of each
    network; method, loss: the names of the method and of the loss. Raises ValueError if not even
    the loop trains, if the config requests a stack or compilation and a network is not capable of
    it, or for a mistake of a user's method.
    """
    engine = _choose_path(engine, requested, candidates, method, loss)
    if requested.compile:
        for name, trainer, initial in candidates:
            _check_compilation(name, trainer, initial, engine.path == "stack")
    return engine


def _choose_path(
    engine: Engine,
    requested: Engine,
    candidates: Sequence[tuple[str, Trainer, Variables]],
    method: str,
    loss: str,
) -> Engine:
    """Return ``rehearse_engine`` without a trial of compilation."""
    for name, trainer, initial in candidates:
        try:
            verdict = None
            if engine.path != "stack":
                check_one_client(trainer, initial)
            else:
                verdict = find_objection(trainer, initial)
        except MethodMistake as mistake:
            raise ValueError(f"algorithm.name = {method}: {mistake}") from None
        except ValueError as error:
            # of a network and a method the user's own one is at fault
            package = f"{__package__.partition('.')[0]}."
            is_own_network = is_external(name) and not name.startswith(package)
            if is_external(method) and not is_own_network:
                setting = f"algorithm.name = {method}"
            elif is_external(loss) and not is_own_network:
                setting = f"model.loss = {loss}"
            else:
                setting = f"model.name = {name}"
            raise ValueError(f"{setting}: {error}") from error.__cause__
        if verdict is None:
            continue
        if is_external(loss):
            name = f"{name} with model.loss = {loss}"
        if verdict.raises and requested.path == "stack":
            raise ValueError(f"engine.path = stack: {name} {verdict.reason}; choose auto or loop")
        despite_request = ", although a stack was asked for" if requested.path == "stack" else ""
        print(
            f"hint: engine.path = {requested.path}: {name} {verdict.reason}; clients train one by "
            f"one{despite_request} (engine.path=loop says so from the start)",
            file=sys.stderr,
            flush=True,
        )
        return replace(
            engine,
            path="loop",
            group_size=1 if requested.group_size == "auto" else requested.group_size,
        )
    return engine


def check_one_client(trainer: Trainer, initial: Variables) -> None:
    """Train and evaluate one client briefly. Raises ValueError if that fails."""
    batch_size = min(_BATCH_SIZE, trainer.settings.batch_size)
    try:
        _play_round(
            _make_trainer(trainer, (batch_size, batch_size), (1, 1), torch.float32, stacked=False),
            initial,
            [0],
        )
    except MethodMistake:
        raise
    except Exception as error:  # a user's module may raise anything
        raise _training_error(error) from error


def _check_compilation(name: str, trainer: Trainer, initial: Variables, stacked: bool) -> None:
    """Raise ValueError if torch cannot compile the steps. It traces them, which takes seconds; what
    may take a minute is left to the run.
    """
    batch_size = min(_BATCH_SIZE, trainer.settings.batch_size)
    trial = _make_trainer(trainer, (batch_size, batch_size), (1, 1), torch.float32, stacked)
    trial = replace(trial, step_compiler=StepCompiler("eager"))
    try:
        _play_round(trial, initial, [0, 1] if stacked else [0])
    except Exception as error:  # torch raises many types
        raise ValueError(
            f"engine.compile = true: {name} cannot be compiled ({error_text(error)}); set "
            "engine.compile=false"
        ) from error


def _why_no_stack(error: Exception) -> str:
    """The reason of ``torch.func.vmap`` in few words, or its message."""
    text = str(error)
    if ".item()" in text or "data-dependent control flow" in text:
        return "it reads numbers of a tensor, for .item() or a condition"
    if operation := re.search(r"aten::\w+", text):
        return f"torch.func.vmap has no rule for {operation[0]}"
    return error_text(error)


def error_text(error: Exception) -> str:
    """An error as part of a line of text."""
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text if len(text) <= _MAX_TEXT else f'{text[:_MAX_TEXT]} ...'}"
    )


def _lowest_precision(v: Variables) -> torch.dtype:
    """The type of the leaves with the lowest precision."""
    dtypes = {leaf.dtype for half in v[:2] for leaf in half.values() if leaf.is_floating_point()}
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _as_precision(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``v`` in double precision if ``dtype`` is float64, else unchanged."""
    return v.double() if dtype == torch.float64 and v.is_floating_point() else v


def _compare_paths(trainer: Trainer, initial: Variables, dtype: torch.dtype) -> Objection | None:
    """Return the objection found by steps in ``dtype``: float64, or float32 for the precision of a
    run.
    """
    batch_size = min(_BATCH_SIZE, trainer.settings.batch_size)
    sizes = 2 * batch_size, max(1, batch_size - 2)  # the second client's batch is padded
    initial = tmap_vars(lambda v: _as_precision(v, dtype), initial)
    loop, stack = (
        _make_trainer(trainer, sizes, _TEST_SIZES, dtype, stacked) for stacked in (False, True)
    )
    try:
        loop_outcome = _play_round(loop, initial, [0, 1])
    except MethodMistake:
        raise
    except Exception as error:
        if dtype == torch.float32:
            raise _training_error(error) from error
        return Objection(f"knows no double precision ({error_text(error)})", raises=True)
    try:
        stack_outcome = _play_round(stack, initial, [0, 1])
    except Exception as error:
        return Objection(f"cannot train in a stack ({_why_no_stack(error)})", raises=True)
    if loop_outcome.is_close_to(stack_outcome, _TOLERANCES[_lowest_precision(initial)]):
        return None
    return Objection("has other gradients or results in a stack than one by one", raises=False)


def _training_error(error: Exception) -> ValueError:
    return ValueError(f"one step of local training fails: {error_text(error)}")


class _OneEpochTrainer(Trainer):
    """A trainer that runs at most one epoch of every phase. A user's method is guarded where
    clients train one by one: what its losses and visits do wrong raises MethodMistake.
    """

    def local(self, round_: int) -> Sequence[Phase | Visit]:
        return self._guard(_shorten(super().local(round_)))

    def personalization(self, round_: int) -> Sequence[Phase | Visit]:
        return self._guard(_shorten(super().personalization(round_)))

    def _guard(self, items: list[Phase | Visit]) -> list[Phase | Visit]:
        # what such a network writes to is not the method's fault
        network_writes = bool(self.model.effects.written_parameters)
        if self.stacked or network_writes or is_package_method(self.algorithm):
            return items
        return guard_items(items)


def _shorten(items: Sequence[Phase | Visit]) -> list[Phase | Visit]:
    """The items with one epoch of every phase."""
    return [
        item._replace(epochs=min(1, item.epochs)) if isinstance(item, Phase) else item
        for item in items
    ]


def _make_trainer(
    trainer: Trainer,
    sizes: tuple[int, int],
    test_sizes: tuple[int, int],
    dtype: torch.dtype,
    stacked: bool,
) -> Trainer:
    """A trainer of two clients with ``sizes`` training samples; it changes nothing of
    ``trainer``.
    """
    settings = replace(trainer.settings, batch_size=min(_BATCH_SIZE, trainer.settings.batch_size))
    feed = _CastFeed(cast(Feed, trainer.feed).with_two_clients(sizes, test_sizes), dtype)
    model = _copy_model(trainer.model, dtype)
    return _OneEpochTrainer(trainer.transport, model, settings, feed, trainer.device, stacked)


def _copy_model(model: Model, dtype: torch.dtype) -> Model:
    """A copy of the network in this precision, including the state of its modules."""
    modules, bodies = copy.deepcopy((model.modules, model.bodies))
    initial = tmap(lambda v: _as_precision(v, dtype), model.initial)
    return replace(model, initial=initial, modules=modules, bodies=bodies)


class _Outcome(NamedTuple):
    """What clients have learned, and their scores."""

    changes: list[Tensor]  # end - start, of each client and leaf
    magnitudes: list[float]  # largest magnitude of each leaf at the start
    losses: list[Tensor]

    def is_close_to(self, other: "_Outcome", tolerance: float) -> bool:
        """Whether two outcomes are equal up to rounding. The changes of a leaf without gradient are
        only rounding, so the tolerance also depends on the other leaves and on the size of the
        leaf's values.
        """
        smallest_step = 1e-3 * max(map(_largest_magnitude, self.changes), default=0.0)
        for a, b, size in zip(self.changes, other.changes, self.magnitudes, strict=True):
            atol = tolerance * max(_largest_magnitude(a), smallest_step, 1e-5 * size)
            if not torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True):
                return False
        pairs = zip(self.losses, other.losses, strict=True)
        return all(
            torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
            for a, b in pairs
        )


def _play_round(trainer: Trainer, initial: Variables, clients: Sequence[int]) -> _Outcome:
    """Return the outcome of one round of ``clients`` that starts from ``initial``."""
    rows = {name: v.expand(len(clients), *v.shape).clone() for name, v in initial.personal.items()}
    shared, outcome = tmap(torch.clone, initial.shared), _Outcome([], [], [])
    with warnings.catch_warnings(), _without_tf32():
        warnings.simplefilter("ignore")
        for result in trainer.train(clients, shared, rows, 0, evaluate=True):
            if not trainer.stacked:
                way_out = "its visits must return the personal leaves of init"
                need_layout("the result of local", result.end.personal, initial.personal, way_out)
            for start, end in zip(result.start[:2], result.end[:2], strict=True):
                outcome.changes.extend(
                    end[n].detach().double() - start[n].double() for n in end if n in start
                )
                outcome.magnitudes.extend(
                    _largest_magnitude(start[n].double()) for n in end if n in start
                )
            assert result.score is not None
            outcome.losses.extend((result.loss, result.score[1]))
        outcome.losses.append(trainer.evaluate(clients, shared, rows)[:, 1])
    return outcome


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable tf32 inside the context, because its rounding would hide differences."""
    # torch declares no ``allow_tf32``
    backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed_before = [backend.allow_tf32 for backend in backends]
    try:
        for place in backends:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(backends, allowed_before, strict=True):
            place.allow_tf32 = allowed


def _largest_magnitude(v: Tensor) -> float:
    """The largest finite magnitude."""
    return float(v.nan_to_num(0.0, 0.0, 0.0).abs().max()) if v.numel() else 0.0


class _CastFeed:
    """A feed with its inputs and targets cast to another precision."""

    def __init__(self, feed, dtype: torch.dtype) -> None:
        self._feed, self._dtype = feed, dtype
        self.train_size, self.test_size = feed.train_size, feed.test_size

    def epoch(self, *args) -> Epoch:
        epoch = self._feed.epoch(*args)
        return replace(epoch, store=_CastStore(epoch.store, self._dtype))

    def test_batch(self, *args) -> Batch:
        return self._cast(self._feed.test_batch(*args))

    def unshuffled_batch(self, clients: Sequence[int], all_samples: bool) -> Batch:
        return self._cast(self._feed.unshuffled_batch(clients, all_samples))

    def _cast(self, batch: Batch) -> Batch:
        x, y = (_as_precision(v, self._dtype) for v in (batch.x, batch.y))
        return batch._replace(x=x, y=y)


class _CastStore:
    """A store with its inputs and targets cast to another precision."""

    def __init__(self, store, dtype: torch.dtype) -> None:
        self._store, self._dtype, self.sample_numel = store, dtype, store.sample_numel

    def read(self, rows: Tensor, warps: Tree) -> tuple[Tensor, Tensor]:
        x, y = self._store.read(rows, warps)
        return _as_precision(x, self._dtype), _as_precision(y, self._dtype)
