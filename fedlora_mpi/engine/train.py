"""Local training of a group of clients: one stack with a leading client axis, or one by one.

The functions of an algorithm are about one client. The stacked path hands them to ``vmap``; the
loop calls them as they are. Everything else is the same code, so both do the same arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from ..algorithm import Algorithm, Batch, Loss, Phase, Sgd, Step, Train, Vars
from ..models.network import Model
from ..models.pooling import Pooling
from ..tree import Tree, tmap
from .compiled import Compiled

_TEST_BATCH = 1000  # test samples in one forward pass, over all clients of a stack
_JUDGED = 100  # clients of the largest stack that is evaluated, for each has a copy of its weights


class Trained(NamedTuple):
    """What one client has to say after local training."""

    client: int
    start: Vars  # as ``Algorithm.begin`` left them
    end: Vars  # as ``Algorithm.finish`` left them
    loss: Tensor  # [] mean training loss of the last epoch
    score: Tensor | None  # [2] test accuracy and loss of the client's own model at this moment


@dataclass(frozen=True)
class Trainer:
    """Trains and evaluates clients on one device. ``feed`` is a ``data.feed.Feed``."""

    algorithm: Algorithm
    model: Model
    settings: Train
    feed: object
    device: torch.device
    stacked: bool
    compiled: Compiled | None = None

    def train(
        self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int, evaluate: bool = False
    ) -> Iterator[Trained]:
        """Train ``clients`` (largest first) from ``shared`` and their rows ``personal_C`` [C, ...].

        Nothing given is written to. The results of a stack are views into it.
        """
        phases = self.algorithm.phases(self.model, self.settings, round_)
        for members in self._together(len(clients)):
            ids = [clients[c] for c in members]
            start = self._arrived(ids, shared, personal_C, members)
            now, loss_C = self._train(ids, start, tmap_vars(self._copy, start), round_, phases)
            with torch.no_grad():
                end = self._finished(ids, start, now)
                score_C = self._scores(ids, end) if evaluate else None
            for row, client in enumerate(ids):
                one = (lambda v: v[row]) if self.stacked else (lambda v: v)
                score = None if score_C is None else score_C[row]
                yield Trained(client, tmap_vars(one, start), tmap_vars(one, end), loss_C[row], score)

    def evaluate(self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int = 0) -> Tensor:
        """Test accuracy (fraction) and mean loss of each client's own model, float64 [C, 2].

        Clients as in ``train``. NaN without test samples; without training samples nothing is tuned.
        """
        phases = self.algorithm.tune(self.model, self.settings, round_)
        scores = []
        for members in self._together(len(clients)):
            ids = [clients[c] for c in members]
            if phases:
                start = self._spread(shared, personal_C, members)
                v, _ = self._train(ids, start, tmap_vars(self._copy, start), round_, phases)
                scores.append(self._scores(ids, v))
            else:
                personal = personal_C if self.stacked else {n: v[members[0]] for n, v in personal_C.items()}
                here = self._to_device(shared)
                received = here if self.algorithm.judges == "server" else self.algorithm.download(here)
                v = Vars(received, self._to_device(personal))
                scores.append(self._scores(ids, v, shared_axis=None))
        return torch.cat(scores) if scores else torch.zeros(0, 2, dtype=torch.float64)

    def judged_at_once(self, clients: Sequence[int], round_: int) -> int:
        """Clients in a stack of ``evaluate``: more than train together where they have few test samples."""
        if not self.stacked or self.algorithm.tune(self.model, self.settings, round_):
            return 1
        return min(_JUDGED, _TEST_BATCH // max(1, *map(self.feed.test_size, clients)))

    def pooling(self) -> AbstractContextManager:
        """What a forward pass runs under."""
        return Pooling() if self.stacked and self.device.type == "cpu" else nullcontext()

    def _together(self, count: int) -> list[Sequence[int]]:
        """Which of ``count`` clients compute at once: all in a stack, or each alone."""
        return [range(count)] if self.stacked else [[c] for c in range(count)]

    @torch.no_grad()
    def _scores(self, ids: Sequence[int], v: Vars, shared_axis: int | None = 0) -> Tensor:
        """[C, 2]: accuracy and loss. ``v``: stacked, but for ``v.shared`` where ``shared_axis`` is None."""
        model = self.model.evaluating()

        def one(shared: Tree, personal: Tree, x: Tensor, y: Tensor) -> Tensor:
            with self.pooling():
                logits = self.algorithm.logits(model, Vars(shared, personal), x)
            loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            return torch.stack([(logits.argmax(1) == y).double(), loss.double()], 1)  # [B, 2]

        each = vmap(one, in_dims=(shared_axis, 0, 0, 0)) if self.stacked else None
        sizes = torch.tensor([self.feed.test_size(c) for c in ids])
        total = torch.zeros(len(ids), 2, dtype=torch.float64)
        width = max(1, _TEST_BATCH // len(ids))
        for first in range(0, int(sizes.max()), width):
            batch = self.feed.test(ids, first, min(width, int(sizes.max()) - first))
            given = (v.shared, v.personal)
            score = each(*given, batch.x, batch.y) if each else one(*given, batch.x[0], batch.y[0])[None]
            if batch.real is not None:
                score = score * batch.real.unsqueeze(-1)
            total += score.sum(1).cpu()
        return total / sizes.unsqueeze(1)

    @torch.no_grad()
    def _arrived(self, ids: Sequence[int], shared: Tree, personal_C: Tree, members: Sequence[int]) -> Vars:
        """Variables at the start of training, after ``Algorithm.begin``."""
        start = self._spread(shared, personal_C, members)
        if type(self.algorithm).begin is Algorithm.begin:
            return start
        return self._each(lambda v, data: self.algorithm.begin(self.model, v, data), start, self._survey(ids))

    def _finished(self, ids: Sequence[int], start: Vars, now: Vars) -> Vars:
        """Variables after ``Algorithm.finish``."""
        if type(self.algorithm).finish is Algorithm.finish:
            return now
        finish = lambda s, e, data: self.algorithm.finish(self.model, self.settings, s, e, data)
        return self._each(finish, start, now, self._survey(ids))

    def _survey(self, ids: Sequence[int]) -> Batch:
        """All training samples of the clients if the algorithm wants them, else their first alone."""
        return self.feed.survey(ids, whole=self.algorithm.surveys)

    def _each(self, hook: Callable, *given: Vars | Batch):
        """``hook`` for every client: its last argument is a batch, the others are variables."""
        *variables, data = given
        if not self.stacked:
            return hook(*variables, Batch(*(v if v is None else v[0] for v in data)))
        axes = tuple(0 for _ in variables), tuple(None if v is None else 0 for v in data)
        return vmap(lambda v, d: hook(*v, Batch(*d)), in_dims=axes)(tuple(variables), tuple(data))

    def _spread(self, shared: Tree, personal_C: Tree, members: Sequence[int]) -> Vars:
        """The variables of these clients, [C, ...] in a stack; nothing is copied."""
        shared = self.algorithm.download(self._to_device(shared))
        if self.stacked:
            spread = tmap(lambda v: v.expand(len(members), *v.shape), shared)
            return Vars(spread, self._to_device(personal_C))
        return Vars(shared, self._to_device({n: v[members[0]] for n, v in personal_C.items()}))

    def _copy(self, v: Tensor) -> Tensor:
        """A copy that training may write to; one client's convolution weights in the layout that
        CPUs and GPUs compute fastest in (1.5 times for CIFAR-size ResNets)."""
        last = v.dim() == 4 and not self.stacked
        return v.clone(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _to_device(self, tree: Tree) -> Tree:
        return tmap(lambda v: v.to(self.device), tree)

    def _train(
        self, ids: Sequence[int], start: Vars, now: Vars, round_: int, phases: Sequence[Phase]
    ) -> tuple[Vars, Tensor]:
        """Play ``phases`` on ``now``; the new variables and the losses [C].

        Epochs are numbered over the phases, so a phase without epochs, or with a stream of its own,
        moves no batch of the others.
        """
        loss_C, number = torch.zeros(len(ids)), 0
        for phase in phases:
            if phase.epochs == 0:
                continue
            walk = Walk(self, phase, start, now, len(ids))
            for epoch in range(phase.epochs):
                address = f"{phase.stream} {epoch}" if phase.stream else number
                loss_C = self._epoch(walk, ids, round_, address)
                number += not phase.stream
            if phase.after:
                with torch.no_grad():
                    now = (vmap(phase.after) if self.stacked else phase.after)(now)
        return now, loss_C

    def _epoch(self, walk: "Walk", ids: Sequence[int], round_: int, address: int | str) -> Tensor:
        """One pass of every client over its own data; mean loss of each client, [C]."""
        used = [self.algorithm.used(walk.phase, self.feed.train_size(client)) for client in ids]
        epoch = self.feed.epoch(ids, round_, address, self.algorithm.held_out, walk.phase.held_out)
        if used != list(epoch.sizes):
            epoch = epoch.cut(used)  # in a stack, what is not used is padding
        total_C, seen_C = torch.zeros(2, len(ids), device=self.device)
        for first in range(0, used[0], self.settings.batch_size):
            count = sum(size > first for size in used)  # who still has data: the first of the list
            batch_C = epoch.batch(count, first, min(self.settings.batch_size, used[0] - first))
            examples = batch_C.y.shape[1] if batch_C.real is None else batch_C.real.sum(1)
            total_C[:count] += walk.play(batch_C, count) * examples
            seen_C[:count] += examples
        return (total_C / seen_C).cpu()


Names = list[tuple[int, str]]  # (0 shared or 1 personal, leaf)


class _View(NamedTuple):
    """What a step needs of the clients that still train."""

    now: Vars  # the trained leaves require gradients
    start: Vars
    momenta: list[Tensor]  # of the trained ones
    leaves: list[Tensor]
    fused: Callable | None = None  # a step of a full batch, where it is compiled


class Walk:
    """The steps of one phase: owns the momenta, which start at zero, and the views."""

    def __init__(self, trainer: Trainer, phase: Phase, start: Vars, now: Vars, clients: int) -> None:
        self._trainer, self.phase, self._start, self._clients = trainer, phase, start, clients
        if phase.constant:
            with torch.no_grad():
                constant = vmap(phase.constant) if trainer.stacked else phase.constant
                now = now._replace(constant=constant(now))
        self._now = now
        common = Sgd(trainer.settings.lr, trainer.settings.momentum, trainer.settings.weight_decay)
        self._sgd = [step.sgd(common) if step.sgd else common for step in phase.steps]
        self._momenta = [self._momentum(step) for step in phase.steps]
        self._views: dict[tuple[int, int], _View] = {}

    def play(self, batch_C: Batch, count: int) -> Tensor:
        """All steps on one batch of the first ``count`` clients; their first losses [count]."""
        losses = [self._play(number, step, batch_C, count) for number, step in enumerate(self.phase.steps)]
        return losses[0]

    def _play(self, number: int, step: Step, batch_C: Batch, count: int) -> Tensor:
        at = (number, count)
        if at not in self._views:
            self._views[at] = self._view(number, count)
        view, sgd = self._views[at], self._sgd[number]
        frequent = count == self._clients and batch_C.y.shape[1] == self._trainer.settings.batch_size
        for _ in range(step.repeat):
            loss_C = view.fused(batch_C) if view.fused and frequent else self._step(step, sgd, view, batch_C)
        return loss_C

    def _step(self, step: Step, sgd: Sgd, view: _View, batch_C: Batch) -> Tensor:
        """One step on ``view``, in place; the losses before it [count]."""
        loss_C = self._losses(step.loss, view, batch_C)
        grads = torch.autograd.grad(loss_C.sum(), view.leaves, allow_unused=True, materialize_grads=True)
        sgd_step(view.leaves, grads, view.momenta, sgd, step.clamp)
        return loss_C.detach()

    def _fused(self, number: int, names: Names, now: Vars, start: Vars, momenta: list[Tensor]) -> Callable:
        """``_step`` as a compiled function of the batch."""
        step, sgd = self.phase.steps[number], self._sgd[number]

        def pure(now: Vars, start: Vars, momenta: list[Tensor], batch_C: Batch) -> Tensor:
            halves = [{n: v.detach() for n, v in half.items()} for half in now[:2]]
            leaves = [halves[half][name].requires_grad_() for half, name in names]
            return self._step(step, sgd, _View(Vars(*halves, now.constant), start, momenta, leaves), batch_C)

        told = step.loss, tuple(names), sgd, step.clamp
        return self._trainer.compiled.of(pure, told, now, start, momenta)

    def _momentum(self, step: Step) -> list[Tree]:
        """Zeros for the trained leaves of either half."""
        trains = lambda leaf: step.trains(leaf) and self._trainer.model.role(leaf) != "stats"
        return [{n: torch.zeros_like(v) for n, v in half.items() if trains(n)} for half in self._now[:2]]

    def _view(self, number: int, count: int) -> _View:
        """The first ``count`` rows of everything, as views: a step writes through them."""
        narrow = (lambda v: v[:count]) if self._trainer.stacked else (lambda v: v)
        leaves, momenta, names, halves = [], [], [], []
        for at, (half, momentum) in enumerate(zip(self._now[:2], self._momenta[number])):
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
            with self._trainer.pooling(), model.prepared(batch := Batch(*batch)):
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
