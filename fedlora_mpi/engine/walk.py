"""The steps of one phase of local training, on a stack of clients or on one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from ..algorithm import Batch, Loss, Phase, Sgd, Step, Vars
from ..core.tree import Tree, tmap

Trainer = object  # an ``engine.train.Trainer``
Epoch = object  # a ``data.feed.Epoch``
Names = list[tuple[int, str]]  # (0 shared or 1 personal, leaf)


class _View(NamedTuple):
    """What a step needs of the clients that still train."""

    now: Vars  # the trained leaves require gradients
    start: Vars
    momenta: list[Tensor]  # of the trained ones
    leaves: list[Tensor]
    fused: Callable | None = None  # a step of a full batch, where it is compiled


class Walk:
    """The steps of one phase: owns the momenta, which start at zero, and the views; trains ``now``
    in place.

    start, now: variables, [C, ...] where ``trainer.stacked``.
    """

    def __init__(
        self, trainer: Trainer, phase: Phase, start: Vars, now: Vars, clients: int
    ) -> None:
        self._trainer, self.phase, self._start, self._clients = trainer, phase, start, clients
        self._now = now._replace(constant=self._constant(now)) if phase.constant else now
        common = Sgd(trainer.settings.lr, trainer.settings.momentum, trainer.settings.weight_decay)
        self._sgd = [step.sgd(common) if step.sgd else common for step in phase.steps]
        self._momenta = [self._momentum(step) for step in phase.steps]
        self._views: dict[tuple[int, int], _View] = {}

    @property
    def written(self) -> list[Tensor]:
        """The tensors that steps write to."""
        halves = (*self._now[:2], *(half for momentum in self._momenta for half in momentum))
        return [v for half in halves for v in half.values()]

    def pass_over(self, epoch: Epoch) -> Tensor:
        """One pass of every client over its own data; mean loss of each client, [C]."""
        sums = epoch.counts.new_zeros(2, self._clients)
        self.play_over(epoch, self.firsts(epoch), sums)
        return sums[0] / sums[1]

    def firsts(self, epoch: Epoch) -> range:
        """Where the batches of a pass begin."""
        return range(0, epoch.sizes[0], self._trainer.settings.batch_size)

    def play_over(self, epoch: Epoch, firsts: range, sums: Tensor) -> None:
        """All steps on the batches that begin at ``firsts``. Adds to ``sums`` [2, C] each client's
        losses, times their examples, and its examples. Waits for no device.
        """
        if not firsts:
            return
        losses = pad_sequence(
            [self.play(batch_C, count) for count, batch_C in epoch.batches(firsts)],
            batch_first=True,
        )
        # sums of half numbers are none
        losses = losses.float() if losses.dtype.itemsize < 4 else losses
        begun = torch.arange(firsts.start, firsts.stop, firsts.step, device=losses.device)
        # [steps, C]
        examples = (epoch.lengths[: losses.shape[1]] - begun[:, None]).clamp(0, firsts.step)
        sums[:, : losses.shape[1]] += torch.stack([losses * examples, examples]).sum(1)

    def play(self, batch_C: Batch, count: int) -> Tensor:
        """All steps on one batch of the first ``count`` clients; their first losses [count]."""
        losses = [
            self._play(number, step, batch_C, count) for number, step in enumerate(self.phase.steps)
        ]
        return losses[0]

    def end(self) -> None:
        """What was trained is in ``now``."""

    @torch.no_grad()
    def restart(self, start: Vars, now: Vars) -> None:
        """The same steps on other variables of the same layout, copied into the memory of the first
        ones.
        """
        halves = zip((*self._start[:2], *self._now[:2]), (*start[:2], *now[:2]), strict=True)
        for places, values in halves:
            for name, place in places.items():
                fill(place, values[name])
        if self.phase.constant:
            for name, value in self._constant(self._now).items():
                fill(self._now.constant[name], value)
        for momentum in (half for momenta in self._momenta for half in momenta):
            for v in momentum.values():
                v.zero_()

    @torch.no_grad()
    def copy_to(self, now: Vars) -> None:
        """Copy what was trained into other variables."""
        for values, places in zip(self._now[:2], now[:2], strict=True):
            for name, value in values.items():
                fill(places[name], value)

    def _constant(self, now: Vars) -> Tree:
        with torch.no_grad():
            return (vmap(self.phase.constant) if self._trainer.stacked else self.phase.constant)(
                now._replace(constant={})
            )

    def _play(self, number: int, step: Step, batch_C: Batch, count: int) -> Tensor:
        at = (number, count)
        if at not in self._views:
            self._views[at] = self._view(number, count)
        view, sgd = self._views[at], self._sgd[number]
        frequent = (
            count == self._clients and batch_C.y.shape[1] == self._trainer.settings.batch_size
        )
        for _ in range(step.repeat):
            loss_C = (
                view.fused(batch_C)
                if view.fused and frequent
                else self._step(step, sgd, view, batch_C)
            )
        return loss_C

    def _step(self, step: Step, sgd: Sgd, view: _View, batch_C: Batch) -> Tensor:
        """One step on ``view``, in place; the losses before it [count]."""
        loss_C = self._losses(step.loss, view, batch_C)
        if view.leaves:
            grads = torch.autograd.grad(loss_C.sum(), view.leaves, allow_unused=True)
            # as torch.optim.SGD leaves the others
            used = [at for at, grad in enumerate(grads) if grad is not None]
            dense = [g if (g := grads[at]).layout == torch.strided else g.to_dense() for at in used]
            leaves, momenta = ([half[at] for at in used] for half in (view.leaves, view.momenta))
            sgd_step(leaves, dense, momenta, sgd, step.clamp)
        return loss_C.detach()

    def _fused(
        self, number: int, names: Names, now: Vars, start: Vars, momenta: list[Tensor]
    ) -> Callable:
        """``_step`` as a compiled function of the batch."""
        step, sgd = self.phase.steps[number], self._sgd[number]

        def pure(now: Vars, start: Vars, momenta: list[Tensor], batch_C: Batch) -> Tensor:
            halves = [{n: v.detach() for n, v in half.items()} for half in now[:2]]
            leaves = [halves[half][name].requires_grad_() for half, name in names]
            return self._step(
                step, sgd, _View(Vars(*halves, now.constant), start, momenta, leaves), batch_C
            )

        told = step.loss, tuple(names), sgd, step.clamp
        return self._trainer.compiled.of(pure, told, now, start, momenta)

    def _momentum(self, step: Step) -> list[Tree]:
        """Zeros for the trained leaves of either half."""

        def trains(leaf):
            return step.trains(leaf) and self._trainer.model.role(leaf) != "stats"

        return [
            {n: torch.zeros_like(v) for n, v in half.items() if trains(n)} for half in self._now[:2]
        ]

    def _view(self, number: int, count: int) -> _View:
        """The first ``count`` rows of everything, as views: a step writes through them."""
        narrow = (lambda v: v[:count]) if self._trainer.stacked else (lambda v: v)
        leaves, momenta, names, halves = [], [], [], []
        for at, (half, momentum) in enumerate(
            zip(self._now[:2], self._momenta[number], strict=True)
        ):
            seen = {}
            for name, value in half.items():
                seen[name] = narrow(value.detach())
                if name in momentum:
                    leaves.append(seen[name].requires_grad_())
                    momenta.append(narrow(momentum[name]))
                    names.append((at, name))
            halves.append(seen)
        now, start = Vars(*halves, tmap(narrow, self._now.constant)), tmap_vars(narrow, self._start)
        fused = self._fused(number, names, now, start, momenta) if self._trainer.compiled else None
        return _View(now, start, momenta, leaves, fused)

    def _losses(self, loss: Loss, view: _View, batch_C: Batch) -> Tensor:
        """The loss of each client, [count]."""
        model = self._trainer.model

        def one(now: Vars, start: Vars, *batch: Tensor | None) -> Tensor:
            with self._trainer.forward(), model.prepared(batch := Batch(*batch)):
                return loss(now, start, batch)

        if not self._trainer.stacked:
            return one(view.now, view.start, *(v if v is None else v[0] for v in batch_C))[None]
        axes = (None if v is None else 0 for v in batch_C)
        return vmap(one, in_dims=(0, 0, *axes))(view.now, view.start, *batch_C)


@torch.no_grad()
def sgd_step(
    leaves: list[Tensor],
    grads: Sequence[Tensor],
    momenta: list[Tensor],
    sgd: Sgd,
    clamp: tuple[float, float] | None = None,
) -> None:
    """v <- m v + g + wd w;  w <- clamp(w - lr v), in place on ``leaves`` and ``momenta``."""
    if not leaves:
        return
    if sgd.weight_decay:
        grads = torch._foreach_add(grads, leaves, alpha=sgd.weight_decay)
    if sgd.momentum:
        torch._foreach_mul_(momenta, sgd.momentum)
        torch._foreach_add_(momenta, grads)
        grads = momenta
    torch._foreach_add_(leaves, grads, alpha=-sgd.lr)
    if clamp:
        torch._foreach_clamp_min_(leaves, clamp[0])
        torch._foreach_clamp_max_(leaves, clamp[1])


def tmap_vars(fn: Callable[[Tensor], Tensor], v: Vars) -> Vars:
    """``fn`` on every shared and personal leaf."""
    return Vars(tmap(fn, v.shared), tmap(fn, v.personal))


def fill(place: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``place``, which may repeat its numbers along some axes if ``value``
    does.
    """
    for axis, (length, stride) in enumerate(zip(place.shape, place.stride(), strict=True)):
        if stride == 0 and length > 1:
            place, value = place.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    place.copy_(value)
