"""Local training of a group of clients: one stack with a leading client axis, or one by one.

The functions of an algorithm are about one client. The stacked path hands them to ``vmap``; the
loop calls them as they are. Everything else is the same code, so both do the same arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from ..algorithm import Algorithm, Batch, Phase, Train, Vars
from ..core.scheduling import equal_parts
from ..core.transfer import to_device, to_host
from ..core.tree import Tree, tmap
from ..models.network import Model
from ..models.pooling import LARGE, Pooling
from .compiled import Compiled
from .graphs import Graphs
from .memory import Room
from .walk import Walk, tmap_vars

T = TypeVar("T")
_TEST_BATCH = 1000  # test samples in one forward pass, over all clients of a stack
_JUDGED = 100  # clients of the largest stack that is evaluated, for each has a copy of its weights


class Trained(NamedTuple):
    """What one client has to say after local training."""

    client: int
    start: Vars  # as ``Algorithm.begin`` left them
    end: Vars  # as ``Algorithm.finish`` left them
    loss: Tensor  # [] mean training loss of the last epoch, on the host
    # [2] test accuracy and loss of the client's own model at this moment, on the host
    score: Tensor | None
    kept: Tree  # ``end.personal`` on the host
    # [] fraction of its test samples with a logit that is no number, on the host
    nan_predictions: Tensor | None = None


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
    graphs: Graphs | None = None
    precision: str = "float32"
    room: Room = field(default_factory=Room)

    def train(
        self,
        clients: Sequence[int],
        shared: Tree,
        personal_C: Tree,
        round_: int,
        evaluate: bool = False,
    ) -> Iterator[Trained]:
        """Train ``clients`` (largest first) from ``shared`` and their rows ``personal_C`` [C, ...].

        Nothing given is written to. The results of a stack are views into it.
        """
        phases = self.phases(round_)

        def trained(members: Sequence[int]) -> tuple[Vars, Vars, list[Tensor]]:
            ids = [clients[c] for c in members]
            start = self._arrived(ids, shared, personal_C, members)
            now, loss_C = self._train(ids, start, tmap_vars(self._copy, start), round_, phases)
            with torch.no_grad():
                end = self._finished(ids, start, now)
                score_C = [self._scores(ids, end)] if evaluate else []
            return start, end, to_host([loss_C, *end.personal.values(), *score_C])

        for members, (start, end, (loss_C, *kept)) in self._in_parts(len(clients), trained):
            score_C = kept.pop() if evaluate else None
            for row, client in enumerate(clients[c] for c in members):

                def one(v: Tensor, row: int = row) -> Tensor:
                    return v[row] if self.stacked else v

                score, nan = (
                    (None, None) if score_C is None else (score_C[row, :2], score_C[row, 2])
                )
                own = dict(zip(end.personal, map(one, kept), strict=True))
                yield Trained(
                    client, tmap_vars(one, start), tmap_vars(one, end), loss_C[row], score, own, nan
                )

    def evaluate(
        self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int = 0
    ) -> Tensor:
        """Test accuracy (fraction) and mean loss of each client's own model, float64 [C, 2] on the
        host; see ``judge``.
        """
        return self.judge(clients, shared, personal_C, round_)[:, :2]

    def judge(
        self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int = 0
    ) -> Tensor:
        """Test accuracy (fraction), mean loss, and fraction of the test samples with a logit that
        is no number, of each client's own model, float64 [C, 3] on the host.

        Clients as in ``train``. NaN without test samples; without training samples nothing is
        tuned.
        """
        phases = self.tuning(round_)

        def scored(members: Sequence[int]) -> Tensor:
            ids = [clients[c] for c in members]
            if phases:
                start = self._spread(shared, personal_C, members)
                v, _ = self._train(ids, start, tmap_vars(self._copy, start), round_, phases)
                return self._scores(ids, v)
            here = self._to_device(shared)
            received = here if self.algorithm.judges == "server" else self.algorithm.download(here)
            v = Vars(received, self._rows(personal_C, members))
            return self._scores(ids, v, shared_axis=None)

        scores = [score_C for _, score_C in self._in_parts(len(clients), scored)]
        return torch.cat(to_host(scores)) if scores else torch.zeros(0, 3, dtype=torch.float64)

    def phases(self, round_: int) -> Sequence[Phase]:
        """Local training of a round."""
        return self.algorithm.phases(self.model, self.settings, round_)

    def tuning(self, round_: int) -> Sequence[Phase]:
        """What is trained on a copy before an evaluation."""
        return self.algorithm.tune(self.model, self.settings, round_)

    def judged_at_once(self, clients: Sequence[int], round_: int) -> int:
        """Clients in a stack of ``evaluate``: more than train together where they have few test
        samples.
        """
        if not self.stacked or self.tuning(round_):
            return 1
        return min(_JUDGED, _TEST_BATCH // max(1, *map(self.feed.test_size, clients)))

    def forward(self) -> AbstractContextManager:
        """What a forward pass of training runs under."""
        under = ExitStack()
        if self.stacked and self.device.type == "cpu":
            under.enter_context(Pooling(0 if self.compiled else LARGE))
        if self.precision == "bf16":
            under.enter_context(
                torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
            )
        return under

    def _in_parts(
        self, count: int, compute: Callable[[Sequence[int]], T]
    ) -> Iterator[tuple[Sequence[int], T]]:
        """(members, ``compute(members)``) of ``count`` clients: all in a stack, or each alone. A
        stack that does not fit into the device's memory is computed in parts.
        """
        if not self.stacked:
            return (([c], compute([c])) for c in range(count))
        return self.room.parts(
            range(count), compute, self.graphs.clear if self.graphs else lambda: None
        )

    @torch.no_grad()
    def _scores(self, ids: Sequence[int], v: Vars, shared_axis: int | None = 0) -> Tensor:
        """[C, 3] as ``judge`` has it. ``v``: stacked, but for ``v.shared`` where ``shared_axis`` is
        None.
        """
        model = self.model.evaluating()

        def one(shared: Tree, personal: Tree, *batch: Tensor | None) -> Tensor:
            v, batch = Vars(shared, personal), Batch(*batch)
            with model.judged(batch):
                logits = self.algorithm.logits(model, v, batch.x)
            loss = torch.nn.functional.cross_entropy(logits, batch.y, reduction="none")
            nan = logits.isnan().any(1)  # of which argmax makes a class
            hit = (logits.argmax(1) == batch.y) & ~nan
            return torch.stack([hit.double(), loss.double(), nan.double()], 1)  # [B, 3]

        sizes = torch.tensor([self.feed.test_size(c) for c in ids])
        total = torch.zeros(len(ids), 3, dtype=torch.float64, device=self.device)
        for part in self._test_batches(int(sizes.max()), len(ids)):
            batch = self.feed.test(ids, part.start, len(part))
            if self.stacked:
                axes = tuple(None if value is None else 0 for value in batch)
                score = vmap(one, in_dims=(shared_axis, 0, *axes))(v.shared, v.personal, *batch)
            else:
                score = one(
                    v.shared, v.personal, *(value if value is None else value[0] for value in batch)
                )[None]
            if batch.real is not None:
                score = score * batch.real.unsqueeze(-1)
            total += score.sum(1)
        return total / to_device(sizes, self.device).unsqueeze(1)

    def _test_batches(self, most: int, clients: int) -> Sequence[range]:
        """How so many test samples are cut. Where a network's results depend on the cut, in equal
        parts, so that none is a remainder of one.
        """
        if self.model.couples:
            return equal_parts(range(most), _TEST_BATCH)
        width = max(1, _TEST_BATCH // clients)
        return [range(most)[first : first + width] for first in range(0, most, width)]

    @torch.no_grad()
    def _arrived(
        self, ids: Sequence[int], shared: Tree, personal_C: Tree, members: Sequence[int]
    ) -> Vars:
        """Variables at the start of training, after ``Algorithm.begin``."""
        start = self._spread(shared, personal_C, members)
        if type(self.algorithm).begin is Algorithm.begin:
            return start
        return self._each(
            lambda v, data: self.algorithm.begin(self.model, v, data), start, self._survey(ids)
        )

    def _finished(self, ids: Sequence[int], start: Vars, now: Vars) -> Vars:
        """Variables after ``Algorithm.finish``."""
        if type(self.algorithm).finish is Algorithm.finish:
            return now

        def finish(s, e, data):
            return self.algorithm.finish(self.model, self.settings, s, e, data)

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
        """The variables of these clients, [C, ...] in a stack; copies where a network writes to
        what it is given.
        """
        shared = self.algorithm.download(self._to_device(shared))
        if self.stacked:
            shared = tmap(lambda v: v.expand(len(members), *v.shape), shared)
        v = Vars(shared, self._rows(personal_C, members))
        return tmap_vars(torch.clone, v) if self.model.effects.parameters else v

    def _rows(self, personal_C: Tree, members: Sequence[int]) -> Tree:
        """The personal variables of these clients, [C, ...] in a stack."""
        at = slice(members[0], members[-1] + 1) if self.stacked else members[0]
        return self._to_device({n: v[at] for n, v in personal_C.items()})

    def _copy(self, v: Tensor) -> Tensor:
        """A copy that training may write to; one client's convolution weights in the layout that
        CPUs and GPUs compute fastest in (1.5 times for CIFAR-size ResNets)."""
        last = v.dim() == 4 and not self.stacked
        return v.clone(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _to_device(self, tree: Tree) -> Tree:
        return tmap(lambda v: to_device(v, self.device), tree)

    def _train(
        self, ids: Sequence[int], start: Vars, now: Vars, round_: int, phases: Sequence[Phase]
    ) -> tuple[Vars, Tensor]:
        """Play ``phases`` on ``now``; the new variables and the losses [C].

        Epochs are numbered over the phases, so a phase without epochs, or with a stream of its own,
        moves no batch of the others.
        """
        loss_C, number = torch.zeros(len(ids), device=self.device), 0
        for phase in phases:
            if phase.epochs == 0:
                continue
            walk = (self.graphs.walk if self.graphs else Walk)(self, phase, start, now, len(ids))
            for epoch in range(phase.epochs):
                address = f"{phase.stream} {epoch}" if phase.stream else number
                loss_C = self._epoch(walk, ids, round_, address)
                number += not phase.stream
            walk.end()
            if phase.after:
                with torch.no_grad():
                    now = (vmap(phase.after) if self.stacked else phase.after)(now)
        return now, loss_C

    def _epoch(self, walk: Walk, ids: Sequence[int], round_: int, address: int | str) -> Tensor:
        """One pass of every client over its own data; mean loss of each client, [C]."""
        used = [self.algorithm.used(walk.phase, self.feed.train_size(client)) for client in ids]
        epoch = self.feed.epoch(ids, round_, address, self.algorithm.held_out, walk.phase.held_out)
        # what is not used is padding
        return walk.pass_over(epoch if used == list(epoch.sizes) else epoch.cut(used))
