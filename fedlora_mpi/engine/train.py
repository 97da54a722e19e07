"""Local training of a group of clients: one stack with a leading client axis, or one by one.

The functions of an algorithm are about one client. The stacked path hands them to ``vmap``; the
loop calls them as they are. Everything else is the same code, so both do the same arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from ..algorithm import Algorithm, Batch, Loss, Phase, Sgd, Train, Vars
from ..models.network import Model
from ..models.substitutes import Substitutes
from ..tree import Tree, tmap


_TEST_BATCH = 1000  # test samples in one forward pass, over all clients of a stack


class Trained(NamedTuple):
    """What one client has to say after local training."""

    client: int
    start: Vars
    end: Vars
    loss: Tensor  # [] mean training loss of the last epoch


@dataclass(frozen=True)
class Trainer:
    """Trains and evaluates clients on one device. ``feed`` is a ``data.feed.Feed``."""

    algorithm: Algorithm
    model: Model
    settings: Train
    feed: object
    device: torch.device
    stacked: bool

    def train(self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int) -> Iterator[Trained]:
        """Train ``clients`` (largest first) from ``shared`` and their rows ``personal_C`` [C, ...].

        Nothing given is written to. The results of a stack are views into it.
        """
        together = [range(len(clients))] if self.stacked else [[c] for c in range(len(clients))]
        for members in together:
            ids = [clients[c] for c in members]
            start, now = self._begin(shared, personal_C, members)
            loss_C = self._train(ids, start, now, round_)
            for row, client in enumerate(ids):
                one = (lambda v: v[row]) if self.stacked else (lambda v: v)
                yield Trained(
                    client,
                    Vars(start.shared, tmap(one, start.personal)),
                    Vars(tmap(one, now.shared), tmap(one, now.personal)),
                    loss_C[row],
                )

    def evaluate(self, clients: Sequence[int], shared: Tree, personal_C: Tree) -> Tensor:
        """Test accuracy (fraction) and mean loss of each client's own model, float64 [C, 2]."""
        model = self.model.evaluating()

        def one(personal: Tree, shared: Tree, x: Tensor, y: Tensor) -> Tensor:
            logits = self.algorithm.logits(model, Vars(shared, personal), x)
            loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            return torch.stack([(logits.argmax(1) == y).double(), loss.double()], 1)  # [B, 2]

        shared = self._to_device(shared)
        if self.stacked:
            each = vmap(one, in_dims=(0, None, 0, 0))
            return self._test(clients, lambda x, y: each(self._to_device(personal_C), shared, x, y))
        rows = []
        for c, client in enumerate(clients):
            personal = self._to_device({n: v[c] for n, v in personal_C.items()})
            rows.append(self._test([client], lambda x, y: one(personal, shared, x[0], y[0])[None]))
        return torch.cat(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)

    @torch.no_grad()
    def _test(self, clients: Sequence[int], scores: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean of ``scores`` [C, B, 2] over the test samples of each client, [C, 2]."""
        sizes = torch.tensor([self.feed.test_size(c) for c in clients])
        total = torch.zeros(len(clients), 2, dtype=torch.float64)
        width = max(1, _TEST_BATCH // len(clients))
        for first in range(0, int(sizes.max()), width):
            batch = self.feed.test(clients, first, min(width, int(sizes.max()) - first))
            each = scores(batch.x, batch.y)
            if batch.real is not None:
                each = each * batch.real.unsqueeze(-1)
            total += each.sum(1).cpu()
        return total / sizes.unsqueeze(1)

    def _begin(self, shared: Tree, personal_C: Tree, members: Sequence[int]) -> tuple[Vars, Vars]:
        """Variables at the start, and working copies of them that training may write to."""
        if self.stacked:
            start = Vars(self._to_device(shared), self._to_device(personal_C))
            spread = lambda v: v.expand(len(members), *v.shape).clone(memory_format=torch.contiguous_format)
            return start, Vars(tmap(spread, start.shared), tmap(torch.clone, start.personal))
        (row,) = members
        start = Vars(self._to_device(shared), self._to_device({n: v[row] for n, v in personal_C.items()}))
        return start, Vars(tmap(_working_copy, start.shared), tmap(_working_copy, start.personal))

    def _to_device(self, tree: Tree) -> Tree:
        return tmap(lambda v: v.to(self.device), tree)

    def _train(self, ids: Sequence[int], start: Vars, now: Vars, round_: int) -> Tensor:
        """All phases of one round, written into ``now``. Epochs are numbered over the phases, so a
        phase without epochs moves no batch of the others. Returns the losses [C]."""
        loss_C, number = torch.zeros(len(ids)), 0
        for phase in self.algorithm.phases(self.model, self.settings):
            if phase.epochs == 0:
                continue
            walk = _Walk(self, phase, start, now)
            for _ in range(phase.epochs):
                loss_C = self._epoch(walk, ids, round_, number)
                number += 1
        return loss_C

    def _epoch(self, walk: "_Walk", ids: Sequence[int], round_: int, number: int) -> Tensor:
        """One pass of every client over its own data; mean loss of each client, [C]."""
        sizes = [self.feed.train_size(client) for client in ids]
        epoch = self.feed.epoch(ids, round_, number)
        total_C = torch.zeros(len(ids), device=self.device)
        width = self.settings.batch_size
        for first in range(0, sizes[0], width):
            count = sum(size > first for size in sizes)  # who still has data: the first of the list
            batch_C = epoch.batch(count, first, min(width, sizes[0] - first))
            examples = batch_C.y.shape[1] if batch_C.real is None else batch_C.real.sum(1)
            total_C[:count] += walk.step(batch_C, count) * examples
        return total_C.cpu() / torch.tensor(sizes)


class _View(NamedTuple):
    """What a step needs of the clients that still train."""

    now: Vars  # the trained leaves require gradients
    start: Vars
    leaves: list[Tensor]  # the trained ones
    momenta: list[Tensor]


class _Walk:
    """The steps of one phase: owns the momentum, which starts at zero, and the views."""

    def __init__(self, trainer: Trainer, phase: Phase, start: Vars, now: Vars) -> None:
        self._trainer, self._phase, self._start = trainer, phase, start
        common = trainer.settings
        sgd = Sgd(common.lr, common.momentum, common.weight_decay)
        self._sgd = phase.sgd(sgd) if phase.sgd else sgd
        if phase.constant:
            with torch.no_grad():
                constant = vmap(phase.constant) if trainer.stacked else phase.constant
                now = now._replace(constant=constant(now))
        trains = lambda leaf: phase.trains(leaf) and trainer.model.role(leaf) != "stats"
        momentum = lambda half: {n: torch.zeros_like(v) for n, v in half.items() if trains(n)}
        self._now, self._momentum = now, [momentum(now.shared), momentum(now.personal)]
        self._views: dict[int, _View] = {}

    def step(self, batch_C: Batch, count: int) -> Tensor:
        """One SGD step of the first ``count`` clients; their losses [count]."""
        if count not in self._views:
            self._views[count] = self._view(count)
        view = self._views[count]
        loss_C = self._losses(view, batch_C)
        grads = torch.autograd.grad(loss_C.sum(), view.leaves, allow_unused=True, materialize_grads=True)
        sgd_step(view.leaves, grads, view.momenta, self._sgd)
        return loss_C.detach()

    def _view(self, count: int) -> _View:
        """The first ``count`` rows of everything, as views: a step writes through them."""
        narrow = (lambda v: v[:count]) if self._trainer.stacked else (lambda v: v)
        leaves, momenta, halves = [], [], []
        for half, momentum in zip(self._now[:2], self._momentum):
            seen = {}
            for name, value in half.items():
                seen[name] = narrow(value.detach())
                if name in momentum:
                    leaves.append(seen[name].requires_grad_())
                    momenta.append(narrow(momentum[name]))
            halves.append(seen)
        start = Vars(self._start.shared, tmap(narrow, self._start.personal))
        return _View(Vars(*halves, tmap(narrow, self._now.constant)), start, leaves, momenta)

    def _losses(self, view: _View, batch_C: Batch) -> Tensor:
        """The loss of each client, [count]."""
        model, loss = self._trainer.model, self._phase.loss
        odd = batch_C.real is not None or batch_C.y.shape[1] == 1  # padded, or too small for BatchNorm
        if model.noisy or (odd and model.batch_statistics):
            loss = _substituted(loss)
        if not self._trainer.stacked:
            return loss(view.now, view.start, Batch(*(v if v is None else v[0] for v in batch_C)))[None]
        real = None if batch_C.real is None else 0
        one = lambda now, start, *batch: loss(now, start, Batch(*batch))
        each = vmap(one, in_dims=(0, Vars(None, 0, None), 0, 0, real, 0))
        return each(view.now, view.start, *batch_C)


def _substituted(loss: Loss) -> Loss:
    """``loss`` with BatchNorm that skips padding and with keyed noise."""

    def substituted(now: Vars, start: Vars, batch: Batch) -> Tensor:
        with Substitutes(batch.real, batch.key):
            return loss(now, start, batch)

    return substituted


@torch.no_grad()
def sgd_step(leaves: list[Tensor], grads: Sequence[Tensor], momenta: list[Tensor], sgd: Sgd) -> None:
    """v <- m v + g + wd w;  w <- w - lr v, in place on ``leaves`` and ``momenta``."""
    if not leaves:
        return
    if sgd.weight_decay:
        grads = torch._foreach_add(grads, leaves, alpha=sgd.weight_decay)
    if sgd.momentum:
        torch._foreach_mul_(momenta, sgd.momentum)
        torch._foreach_add_(momenta, grads)
        grads = momenta
    torch._foreach_add_(leaves, grads, alpha=-sgd.lr)


def _working_copy(v: Tensor) -> Tensor:
    """A copy that training may write to; convolution weights in the layout that CPUs and GPUs
    compute fastest in (1.5 times for CIFAR-size ResNets)."""
    return v.clone(memory_format=torch.channels_last if v.dim() == 4 else torch.contiguous_format)
