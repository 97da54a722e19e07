"""The steps of one phase of local training, on a stack of clients or on one."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from ..algorithm import Batch, LocalTraining, Loss, Phase, Sgd, Step, Variables
from ..core.tree import Tree, tmap
from ..data.feed import Epoch
from ..models.network import Model
from .compiled import StepCompiler

LeafNames = list[tuple[int, str]]  # (0 shared or 1 personal, leaf)


class Trainer(Protocol):
    """What steps need of an ``engine.train.Trainer``."""

    @property
    def model(self) -> Model: ...

    @property
    def settings(self) -> LocalTraining: ...

    @property
    def stacked(self) -> bool: ...

    @property
    def step_compiler(self) -> StepCompiler | None: ...

    def forward_context(self) -> AbstractContextManager:
        """The context of every forward pass of training."""


class _View(NamedTuple):
    """What a step needs of the clients that still train."""

    now: Variables  # the trained leaves require gradients
    start: Variables
    momenta: list[Tensor]  # of the trained ones
    leaves: list[Tensor]
    compiled_step: Callable | None = None  # a step of a full batch, where it is compiled


class PhaseRunner:
    """Runs the steps of one phase, which train ``now`` in place.

    It owns the momenta, which start at zero, and the views. start, now: variables, [C, ...] where
    ``trainer.stacked``.
    """

    def __init__(
        self, trainer: Trainer, phase: Phase, start: Variables, now: Variables, clients: int
    ) -> None:
        self._trainer, self.phase, self._start, self._clients = trainer, phase, start, clients
        self._now = now._replace(constant=self._constant_tree(now)) if phase.constant else now
        common = Sgd(trainer.settings.lr, trainer.settings.momentum, trainer.settings.weight_decay)
        self._sgd = [step.sgd(common) if step.sgd else common for step in phase.steps]
        self._momenta = [self._zero_momentum(step) for step in phase.steps]
        self._views: dict[tuple[int, int], _View] = {}

    @property
    def written_tensors(self) -> list[Tensor]:
        """The tensors that steps write to."""
        halves = (*self._now[:2], *(half for momentum in self._momenta for half in momentum))
        return [v for half in halves for v in half.values()]

    def run_epoch(self, epoch: Epoch) -> Tensor:
        """One pass of every client over its own data; mean loss of each client, [C]."""
        sums = epoch.counts.new_zeros(2, self._clients)
        self.run_batches(epoch, self.batch_starts(epoch), sums)
        return sums[0] / sums[1]

    def batch_starts(self, epoch: Epoch) -> range:
        """The first position of each batch of a pass."""
        return range(0, epoch.sizes[0], self._trainer.settings.batch_size)

    def run_batches(self, epoch: Epoch, firsts: range, sums: Tensor) -> None:
        """Run all steps on the batches that begin at ``firsts``, without waiting for the device.

        Adds to ``sums`` [2, C] each client's losses, weighted by their examples, and its examples.
        """
        if not firsts:
            return
        losses = pad_sequence(
            [self.run_batch(batch_C, count) for count, batch_C in epoch.batches(firsts)],
            batch_first=True,
        )
        # a sum in half precision would be too coarse
        losses = losses.float() if losses.dtype.itemsize < 4 else losses
        start_positions = torch.arange(firsts.start, firsts.stop, firsts.step, device=losses.device)
        # [steps, C]
        examples = (epoch.lengths[: losses.shape[1]] - start_positions[:, None]).clamp(
            0, firsts.step
        )
        sums[:, : losses.shape[1]] += torch.stack([losses * examples, examples]).sum(1)

    def run_batch(self, batch_C: Batch, count: int) -> Tensor:
        """Run all steps on a batch of ``count`` clients; losses of the first step [count]."""
        losses = [
            self._repeat_step(number, step, batch_C, count)
            for number, step in enumerate(self.phase.steps)
        ]
        return losses[0]

    def end(self) -> None:
        """Bring the result into ``now``; here it is there already."""

    @torch.no_grad()
    def reset(self, start: Variables, now: Variables) -> None:
        """Copy other variables of the same layout into the memory of the present ones."""
        halves = zip((*self._start[:2], *self._now[:2]), (*start[:2], *now[:2]), strict=True)
        copy_all((v, values[n]) for targets, values in halves for n, v in targets.items())
        if self.phase.constant:
            constant = self._constant_tree(self._now)
            copy_all((self._now.constant[n], v) for n, v in constant.items())
        if zeros := [v for momenta in self._momenta for half in momenta for v in half.values()]:
            torch._foreach_zero_(zeros)

    @torch.no_grad()
    def copy_to(self, now: Variables) -> None:
        """Copy the trained variables into others."""
        halves = zip(self._now[:2], now[:2], strict=True)
        copy_all((targets[n], v) for values, targets in halves for n, v in values.items())

    def _constant_tree(self, now: Variables) -> Tree:
        constant = self.phase.constant
        assert constant is not None
        with torch.no_grad():
            return (vmap(constant) if self._trainer.stacked else constant)(
                now._replace(constant={})
            )

    def _repeat_step(self, number: int, step: Step, batch_C: Batch, count: int) -> Tensor:
        view_key = (number, count)
        if view_key not in self._views:
            self._views[view_key] = self._make_view(number, count)
        view, sgd = self._views[view_key], self._sgd[number]
        is_full_batch = (
            count == self._clients and batch_C.y.shape[1] == self._trainer.settings.batch_size
        )
        for _ in range(step.repeat):
            loss_C = (
                view.compiled_step(batch_C)
                if view.compiled_step and is_full_batch
                else self._run_step(step, sgd, view, batch_C)
            )
        return loss_C

    def _run_step(self, step: Step, sgd: Sgd, view: _View, batch_C: Batch) -> Tensor:
        """Run one step on ``view``, in place; the losses before it [count]."""
        loss_C = self._losses(step.loss, view, batch_C)
        if view.leaves:
            grads = torch.autograd.grad(loss_C.sum(), view.leaves, allow_unused=True)
            # a leaf without gradient stays, as in torch.optim.SGD
            with_grad = [position for position, grad in enumerate(grads) if grad is not None]
            dense = [
                g if (g := grads[at]).layout == torch.strided else g.to_dense() for at in with_grad
            ]
            leaves, momenta = (
                [half[at] for at in with_grad] for half in (view.leaves, view.momenta)
            )
            sgd_step(leaves, dense, momenta, sgd, step.clamp)
        return loss_C.detach()

    def _compile_step(
        self, number: int, names: LeafNames, now: Variables, start: Variables, momenta: list[Tensor]
    ) -> Callable:
        """``_run_step`` as a compiled function of the batch."""
        step, sgd = self.phase.steps[number], self._sgd[number]

        def step_on_batch(
            now: Variables, start: Variables, momenta: list[Tensor], batch_C: Batch
        ) -> Tensor:
            halves = [{n: v.detach() for n, v in half.items()} for half in now[:2]]
            leaves = [halves[half][name].requires_grad_() for half, name in names]
            return self._run_step(
                step,
                sgd,
                _View(Variables(halves[0], halves[1], now.constant), start, momenta, leaves),
                batch_C,
            )

        identity = step.loss, tuple(names), sgd, step.clamp
        assert self._trainer.step_compiler is not None
        return self._trainer.step_compiler.compile_step(
            step_on_batch, identity, now, start, momenta
        )

    def _zero_momentum(self, step: Step) -> list[Tree]:
        """Zeros for the trained leaves of both halves."""

        def trains(leaf):
            return step.trains(leaf) and self._trainer.model.role(leaf) != "stats"

        return [
            {n: torch.zeros_like(v) for n, v in half.items() if trains(n)} for half in self._now[:2]
        ]

    def _make_view(self, number: int, count: int) -> _View:
        """Views of the first ``count`` rows of everything; a step writes through them."""
        narrow = (lambda v: v[:count]) if self._trainer.stacked else (lambda v: v)
        leaves, momenta, names, halves = [], [], [], []
        for half_index, (half, momentum) in enumerate(
            zip(self._now[:2], self._momenta[number], strict=True)
        ):
            leaf_views = {}
            for name, value in half.items():
                leaf_views[name] = narrow(value.detach())
                if name in momentum:
                    leaves.append(leaf_views[name].requires_grad_())
                    momenta.append(narrow(momentum[name]))
                    names.append((half_index, name))
            halves.append(leaf_views)
        now, start = (
            Variables(halves[0], halves[1], tmap(narrow, self._now.constant)),
            tmap_vars(narrow, self._start),
        )
        fused = (
            self._compile_step(number, names, now, start, momenta)
            if self._trainer.step_compiler
            else None
        )
        return _View(now, start, momenta, leaves, fused)

    def _losses(self, loss: Loss, view: _View, batch_C: Batch) -> Tensor:
        """The loss of each client, [count]."""
        model = self._trainer.model

        def client_loss(now: Variables, start: Variables, *batch: Tensor | None) -> Tensor:
            with (
                self._trainer.forward_context(),
                model.training_context(batch := Batch._make(batch)),
            ):
                return loss(now, start, batch)

        if not self._trainer.stacked:
            return client_loss(view.now, view.start, *(v if v is None else v[0] for v in batch_C))[
                None
            ]
        axes = (None if v is None else 0 for v in batch_C)
        return vmap(client_loss, in_dims=(0, 0, *axes))(view.now, view.start, *batch_C)


@torch.no_grad()
def sgd_step(
    leaves: list[Tensor],
    grads: list[Tensor] | tuple[Tensor, ...],
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


def tmap_vars(fn: Callable[[Tensor], Tensor], v: Variables) -> Variables:
    """``fn`` on every shared and personal leaf."""
    return Variables(tmap(fn, v.shared), tmap(fn, v.personal))


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``target``. Where ``target`` is expanded, ``value`` must be, too."""
    copy_all([(target, value)])


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """``copy_into`` of (target, value) pairs; on a GPU, tensors of a kind are copied at once."""
    narrowed = [_narrow_expanded(*pair) for pair in pairs]
    if narrowed:
        targets, values = zip(*narrowed, strict=True)
        torch._foreach_copy_(targets, values)


def _narrow_expanded(target: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the repetitions that ``target`` has."""
    for axis, (length, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and length > 1:
            target, value = target.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    return target, value
