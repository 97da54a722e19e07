"""Count the floating-point operations of local training on the real phases.

torch's counter adds up matrix products and convolutions (a multiply-add is 2), forward and
backward, while they run. A step runs on batches of two small sizes. Its cost is exactly a + b n in
the number n of samples, so the cost of any client's round follows without running it. This holds
separately for even n and for odd n above 1, because a method may train on halves of a batch, and a
batch of one sample counts as both halves.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..algorithm import Batch, Phase, Step, Variables, Visit, used_samples
from ..core.escapes import summarize_error
from ..models.counting import FlopCounter
from ..models.network import Model
from .train import Trainer
from .walk import PhaseRunner, tmap_vars

UNCOUNTED = -1


class _UncountableStep(Exception):
    """A step whose FLOPs cannot be counted."""


@dataclass(frozen=True)
class Flops:
    """The FLOPs of the clients of one type.

    ``initial`` holds the variables of such a client as they arrive in round 1. ``beat`` is called
    before every count. ``prints_hint``: whether a hint tells the user what cannot be counted.
    """

    trainer: Trainer
    initial: Variables
    beat: Callable[[], None] = lambda: None
    prints_hint: bool = True
    _counts: dict[tuple, int] = field(default_factory=dict)  # counts so far
    _failures: list[Exception] = field(default_factory=list)  # the error that stopped the counting

    def round_flops(self, samples: int, round_: int) -> int:
        """FLOPs of one client with ``samples`` training samples in round ``round_`` (from 0).
        UNCOUNTED if a step cannot be counted: a missing figure in the log must not end a run.

        Equal steps are counted once for all rounds; the numbers of epochs and samples are those of
        the round.
        """
        if not self._failures:
            try:
                return self._count_round(samples, round_)
            except _UncountableStep as error:
                self._failures.append(error)
                if self.prints_hint:
                    print(
                        f"hint: FLOPs cannot be counted ({error}); the log has {UNCOUNTED} for "
                        "them",
                        file=sys.stderr,
                        flush=True,
                    )
        return UNCOUNTED

    def _count_round(self, samples: int, round_: int) -> int:
        algorithm, settings = self.trainer.algorithm, self.trainer.settings
        total = 0
        for number, item in enumerate(algorithm.local(self._model, settings, round_)):
            if isinstance(item, Visit):
                total += self._extrapolate(
                    ("visit", number, getattr(item.apply, "__code__", item.apply)),
                    partial(self._count_visit, item),
                    samples if item.all_data else 1,
                )
            elif item.epochs:
                total += self._count_epochs(number, item, samples)
        return total

    def _count_epochs(self, number: int, phase: Phase, samples: int) -> int:
        """FLOPs of all epochs of a phase, the item of this number."""
        batch_size = self.trainer.settings.batch_size
        key = ("phase", number, *map(self._step_key, phase.steps))
        count_batch = partial(self._count_phase, phase)
        batches, remainder = divmod(
            used_samples(self.trainer.algorithm, phase, samples), batch_size
        )
        total = phase.epochs * batches * self._extrapolate(key, count_batch, batch_size)
        total += phase.epochs * self._extrapolate(key, count_batch, remainder)
        if phase.constant:
            total += self._count_once((*key, "constant"), partial(self._count_constant, phase), 1)
        return total

    @property
    def _device(self) -> torch.device:
        """Where steps are counted: the CPU, or meta for a network without values."""
        return torch.device("meta" if self.trainer.model.is_without_values else "cpu")

    @property
    def _model(self) -> Model:
        return self.trainer.model.to(self._device)

    @property
    def _variables(self) -> Variables:
        return tmap_vars(lambda leaf: leaf.to(self._device), self.initial)

    def _step_key(self, step: Step) -> tuple:
        """A key that distinguishes this step from the step of the same number in another round."""
        trained_leaves = tuple(
            leaf for half in self.initial[:2] for leaf in half if step.trains(leaf)
        )
        return getattr(step.loss, "__code__", step.loss), trained_leaves, step.repeat

    def _extrapolate(self, key: tuple, count: Callable[[int], int], samples: int) -> int:
        """Return ``count(samples)``, extrapolated from counts of at most 5 samples."""
        base_samples = 2 + samples % 2
        if samples < base_samples:
            return self._count_once(key, count, samples) if samples else 0
        pair_cost = self._count_once(key, count, base_samples + 2) - self._count_once(
            key, count, base_samples
        )
        return self._count_once(key, count, base_samples) + pair_cost * (
            (samples - base_samples) // 2
        )

    def _count_once(self, key: tuple, count: Callable[[int], int], samples: int) -> int:
        """Return ``count(samples)``, cached."""
        cache_key = (*key, samples)
        if cache_key not in self._counts:
            self.beat()
            self._counts[cache_key] = count(samples)
        return self._counts[cache_key]

    def _count_phase(self, phase: Phase, samples: int) -> int:
        """FLOPs of all steps of the phase on one batch."""
        start, now = (tmap_vars(torch.clone, self._variables) for _ in range(2))
        trainer = replace(
            self.trainer,
            model=self._model,
            device=self._device,
            stacked=False,
            step_compiler=None,
        )
        runner = PhaseRunner(trainer, phase, start, now, 1)
        batch_C = Batch._make(None if v is None else v[None] for v in self._zero_batch(samples))
        return self._count_flops(runner.run_batch, batch_C, 1)

    def _count_constant(self, phase: Phase, samples: int) -> int:
        assert phase.constant is not None
        return self._count_flops(phase.constant, self._variables)

    def _count_visit(self, visit: Visit, samples: int) -> int:
        v = self._variables
        return self._count_flops(visit.apply, v, v, self._zero_batch(samples))

    def _zero_batch(self, samples: int) -> Batch:
        """A batch of ``samples`` zero inputs, all of class 0 or with zero targets."""
        model = self._model
        with self._device:
            counts = torch.zeros(model.classes)
            counts[0] = samples
            y = model.loss.zero_targets(samples, model.classes, model.shape[0])
            key = torch.zeros((), dtype=torch.int64)
        return Batch(model.zero_inputs(samples), y, None, key, counts)

    @staticmethod
    def _count_flops(compute: Callable, *args) -> int:
        try:
            with FlopCounter() as counter:
                compute(*args)
        except Exception as error:
            raise _UncountableStep(summarize_error(error)) from error
        return counter.get_total_flops()
