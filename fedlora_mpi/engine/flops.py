"""Floating-point operations of local training, counted on the real phases, not guessed.

torch's counter adds up matrix products and convolutions (a multiply-add is 2), forward and
backward, as they happen. A step is played on batches of two small sizes; its cost is a + b n in the
number n of samples, exactly, so the cost of any client's round follows without playing it. It is so
for even n and for odd n above 1 apart: a method may train on halves of a batch, and a half of one
sample is that sample.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..algorithm import Batch, Phase, Step, Vars
from ..core.escapes import brief
from ..core.tree import tmap
from ..models.counting import FlopCounter
from ..models.network import Model
from .train import Trainer
from .walk import Walk

UNCOUNTED = -1


class _Uncountable(Exception):
    """A step that cannot be counted."""


@dataclass(frozen=True)
class Flops:
    """What the clients of one kind compute; ``first``: the variables of any of them in round 1, as
    they arrive; ``beat`` is called before every count; ``tells``: whether the user hears of what
    cannot be counted.
    """

    trainer: Trainer
    first: Vars
    beat: Callable[[], None] = lambda: None
    tells: bool = True
    _known: dict[tuple, int] = field(default_factory=dict)  # what was counted
    _failed: list[Exception] = field(default_factory=list)  # why nothing more is

    def of_round(self, samples: int, round_: int) -> int:
        """FLOPs of one client with so many training samples in round ``round_`` (from 0); UNCOUNTED
        where a step cannot be counted, for a figure in the log is no reason to end a run.

        Equal steps are counted once for all rounds; epochs and samples are those of the round.
        """
        if not self._failed:
            try:
                return self._of_round(samples, round_)
            except _Uncountable as error:
                self._failed.append(error)
                if self.tells:
                    print(
                        f"hint: FLOPs cannot be counted ({error}); the log has {UNCOUNTED} for "
                        "them",
                        file=sys.stderr,
                        flush=True,
                    )
        return UNCOUNTED

    def _of_round(self, samples: int, round_: int) -> int:
        algorithm, settings = self.trainer.algorithm, self.trainer.settings
        phases, total = algorithm.phases(self._model, settings, round_), 0
        for number, phase in enumerate(phases):
            if phase.epochs == 0:
                continue
            key, played = (
                ("phase", number, *map(self._known_by, phase.steps)),
                partial(self._phase, phase),
            )
            used = algorithm.used(phase, samples)
            batches, rest = divmod(used, settings.batch_size)
            total += phase.epochs * batches * self._cost(key, played, settings.batch_size)
            total += phase.epochs * self._cost(key, played, rest)
            if phase.constant:
                total += self._once(
                    (*key, "constant"),
                    lambda n, phase=phase: self._counted(phase.constant, self.first),
                    1,
                )
        surveyed = samples if algorithm.surveys else 1
        return total + sum(
            self._cost((hook.__name__,), hook, surveyed) for hook in (self._begin, self._finish)
        )

    @property
    def _model(self) -> Model:
        return self.trainer.model.to(torch.device("cpu"))

    def _known_by(self, step: Step) -> tuple:
        """What tells a step from another of the same number in another round."""
        trained = tuple(leaf for half in self.first[:2] for leaf in half if step.trains(leaf))
        return getattr(step.loss, "__code__", step.loss), trained, step.repeat

    def _cost(self, key: tuple, count: Callable[[int], int], samples: int) -> int:
        """``count(samples)``, from counts of at most 5 samples."""
        few = 2 + samples % 2
        if samples < few:
            return self._once(key, count, samples) if samples else 0
        two = self._once(key, count, few + 2) - self._once(key, count, few)
        return self._once(key, count, few) + two * ((samples - few) // 2)

    def _once(self, key: tuple, count: Callable[[int], int], samples: int) -> int:
        """``count(samples)``, remembered."""
        at = (*key, samples)
        if at not in self._known:
            self.beat()
            self._known[at] = count(samples)
        return self._known[at]

    def _phase(self, phase: Phase, samples: int) -> int:
        """FLOPs of all steps on one batch."""

        def copied(v):
            return tmap(lambda leaf: leaf.cpu().clone(), v)

        start, now = (
            Vars(copied(self.first.shared), copied(self.first.personal)) for _ in range(2)
        )
        trainer = replace(
            self.trainer,
            model=self._model,
            device=torch.device("cpu"),
            stacked=False,
            compiled=None,
        )
        walk = Walk(trainer, phase, start, now, 1)
        batch_C = Batch(*(None if v is None else v[None] for v in self._batch(samples)))
        return self._counted(walk.play, batch_C, 1)

    def _begin(self, samples: int) -> int:
        return self._counted(
            self.trainer.algorithm.begin, self._model, self.first, self._batch(samples)
        )

    def _finish(self, samples: int) -> int:
        finish, v = self.trainer.algorithm.finish, self.first
        return self._counted(finish, self._model, self.trainer.settings, v, v, self._batch(samples))

    def _batch(self, samples: int) -> Batch:
        """Samples of zeros, all of class 0."""
        model = self._model
        counts = torch.zeros(model.classes)
        counts[0] = samples
        y, key = torch.zeros(samples, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        return Batch(model.zeros(samples), y, None, key, counts)

    @staticmethod
    def _counted(compute: Callable, *given) -> int:
        try:
            with FlopCounter() as counter:
                compute(*given)
        except Exception as error:
            raise _Uncountable(brief(error)) from error
        return counter.get_total_flops()
