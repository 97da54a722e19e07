"""Local training of a group of clients: one stack with a leading client axis, or one by one.

The functions of an algorithm are about one client. The stacked path hands them to ``vmap``; the
loop calls them as they are. Everything else is the same code, so both do the same arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from ..algorithm import (
    Algorithm,
    Batch,
    LocalTraining,
    Phase,
    Transport,
    Variables,
    Visit,
    used_samples,
)
from ..core.losses import IGNORED, token_losses
from ..core.scheduling import equal_parts
from ..core.transfer import to_device, to_host
from ..core.tree import Tree, tmap
from ..data.feed import Epoch
from ..models.network import Model
from ..models.pooling import LARGE_NUMEL, MaxPoolMode
from .client_streams import ClientStreams
from .compiled import StepCompiler
from .graphs import GraphCache
from .half import bfloat16_forward
from .memory import MemoryBudget
from .metrics import compute_metrics
from .products import ConvolutionsAsProducts
from .walk import PhaseRunner, tmap_vars

T = TypeVar("T")
_TEST_BATCH = 1000  # test samples in one forward pass, over all clients of a stack
# clients of the largest stack that is evaluated: each has a copy of its weights
_MAX_EVALUATION_STACK = 100


class ClientFeed(Protocol):
    """What a trainer needs of a ``data.feed.Feed``."""

    def train_size(self, client: int) -> int: ...

    def test_size(self, client: int) -> int: ...

    def epoch(
        self,
        clients: Sequence[int],
        round_: int,
        epoch: int | str,
        fraction: float = 0.0,
        on_held_out: bool = False,
    ) -> Epoch: ...

    def test_batch(self, clients: Sequence[int], first: int, width: int) -> Batch: ...

    def unshuffled_batch(self, clients: Sequence[int], all_samples: bool) -> Batch: ...


class ClientResult(NamedTuple):
    """Result of one client's training."""

    client: int
    start: Variables  # before the first phase
    end: Variables  # after the last phase or visit
    loss: Tensor  # [] mean training loss of the last epoch, on the host
    # [3 + m] of the client's own model at this moment, as ``Trainer.score_clients`` has them
    score: Tensor | None
    personal: Tree  # ``end.personal``, on the host unless the client's row is on the device


@dataclass(frozen=True)
class Trainer:
    """Trains and evaluates clients on one device."""

    transport: Transport
    model: Model
    settings: LocalTraining
    feed: ClientFeed
    device: torch.device
    stacked: bool
    step_compiler: StepCompiler | None = None
    graphs: GraphCache | None = None
    precision: str = "float32"
    convolutions: str = "grouped"
    memory_budget: MemoryBudget = field(default_factory=MemoryBudget)
    metrics: Sequence[str] = ()  # names in ``metrics.METRICS``
    streams: ClientStreams | None = None  # for clients that are computed at once without a stack

    @property
    def algorithm(self) -> Algorithm:
        """The method as these clients have it."""
        return self.transport.method

    def train(
        self,
        clients: Sequence[int],
        shared: Tree,
        personal_C: Tree,
        round_: int,
        evaluate: bool = False,
    ) -> Iterator[ClientResult]:
        """Train ``clients`` (largest first) from ``shared`` and their rows ``personal_C`` [C, ...].

        No argument is written to. Results of clients in a stack are views of the stack's tensors.
        """
        items = self.local(round_)
        rows_are_here = any(v.device == self.device for v in personal_C.values())

        def train_members(members: Sequence[int]) -> tuple[Variables, Variables, list[Tensor]]:
            # nothing here waits for the device, unless metrics are computed on the host
            ids = [clients[c] for c in members]
            start, end, loss_C = self._run_items(
                ids, self._received_variables(shared, personal_C, members), round_, items
            )
            with torch.no_grad():
                score_C = [self._scores(ids, end)] if evaluate else []
            leaving_C = [] if rows_are_here else end.personal.values()
            return start, end, [loss_C, *leaving_C, *score_C]

        for members, (start, end, numbers) in self._compute_in_parts(len(clients), train_members):
            loss_C, *left_C = to_host(numbers)
            score_C = left_C.pop() if evaluate else None
            end_C = end.personal.values() if rows_are_here else left_C
            for row, client in enumerate(clients[c] for c in members):

                def pick_row(v: Tensor, row: int = row) -> Tensor:
                    return v[row] if self.stacked else v

                personal = dict(zip(end.personal, map(pick_row, end_C), strict=True))
                yield ClientResult(
                    client,
                    tmap_vars(pick_row, start),
                    tmap_vars(pick_row, end),
                    loss_C[row],
                    None if score_C is None else score_C[row],
                    personal,
                )

    def evaluate(
        self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int = 0
    ) -> Tensor:
        """Test accuracy (fraction) and mean loss of each client's own model, float64 [C, 2] on the
        host; see ``score_clients``.
        """
        return self.score_clients(clients, shared, personal_C, round_)[:, :2]

    def score_clients(
        self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int = 0
    ) -> Tensor:
        """Scores of each client's own model, float64 [C, 3 + m] on the host: test accuracy
        (fraction), mean loss, the fraction of its test samples with a NaN logit, and the m metrics.
        Of a language model, accuracy and loss are means over all tokens of its test texts.

        Clients as in ``train``. A client without test samples has NaN. The accuracy is NaN if the
        targets are no classes.
        """
        items = self.personalization(round_)

        def score_members(members: Sequence[int]) -> Tensor:
            ids = [clients[c] for c in members]
            if items:
                received = self._received_variables(shared, personal_C, members)
                return self._scores(ids, self._run_items(ids, received, round_, items)[1])
            device_shared = self._to_device(shared)
            client_shared = (
                device_shared
                if self.algorithm.evaluate_on == "server"
                else self.transport.download(device_shared)
            )
            v = Variables(client_shared, self._personal_rows(personal_C, members))
            return self._scores(ids, v, shared_axis=None)

        scores = [score_C for _, score_C in self._compute_in_parts(len(clients), score_members)]
        return (
            torch.cat(to_host(scores))
            if scores
            else torch.zeros(0, 3 + len(self.metrics), dtype=torch.float64)
        )

    def local(self, round_: int) -> Sequence[Phase | Visit]:
        """The phases and visits of a round."""
        return self.algorithm.local(self.model, self.settings, round_)

    def personalization(self, round_: int) -> Sequence[Phase | Visit]:
        """The phases and visits that train a copy before an evaluation."""
        return self.algorithm.personalize(self.model, self.settings, round_)

    def evaluation_stack_size(self, clients: Sequence[int], round_: int) -> int:
        """Clients that are evaluated in one stack; with few test samples more than train in one.
        Without a stack 1, or as many as there are streams.
        """
        if not self.stacked:
            return self.streams.at_once if self.streams else 1
        if self.personalization(round_):
            return 1
        return min(_MAX_EVALUATION_STACK, _TEST_BATCH // max(1, *map(self.feed.test_size, clients)))

    def forward_context(self) -> AbstractContextManager:
        """The context of every forward pass of training."""
        contexts = ExitStack()
        if self.stacked and self.device.type == "cpu":
            contexts.enter_context(MaxPoolMode(0 if self.step_compiler else LARGE_NUMEL))
        if self.stacked and self.convolutions == "products":
            contexts.enter_context(ConvolutionsAsProducts())
        if self.precision == "bf16":
            contexts.enter_context(bfloat16_forward(self.device, self.stacked))
        return contexts

    def _compute_in_parts(
        self, count: int, compute: Callable[[Sequence[int]], T]
    ) -> Iterator[tuple[Sequence[int], T]]:
        """(members, ``compute(members)``) of ``count`` clients: all in one stack, each alone, or
        each alone and several at once on streams.

        What does not fit into the device's memory at once is computed in parts.
        """
        free_memory = self.graphs.clear if self.graphs else lambda: None
        if self.stacked:
            yield from self.memory_budget.compute_in_parts(range(count), compute, free_memory)
        elif self.streams:
            streams, at_once = self.streams, self.streams.at_once

            def compute_each(part: Sequence[int]) -> list[T]:
                return streams.compute([partial(compute, [c]) for c in part])

            for first in range(0, count, at_once):
                window = range(count)[first : first + at_once]
                for part, results in self.memory_budget.compute_in_parts(
                    window, compute_each, free_memory
                ):
                    yield from (([c], result) for c, result in zip(part, results, strict=True))
        else:
            yield from (([c], compute([c])) for c in range(count))

    @torch.no_grad()
    def _scores(self, ids: Sequence[int], v: Variables, shared_axis: int | None = 0) -> Tensor:
        """[C, 3 + m], see ``score_clients``. ``v`` is stacked; where ``shared_axis`` is None,
        ``v.shared`` is not.
        """
        model = self.model.eval_mode()

        def score_one(shared: Tree, personal: Tree, *batch: Tensor | None) -> tuple[Tensor, Tensor]:
            v, batch = Variables(shared, personal), Batch._make(batch)
            with model.evaluation_context(batch):
                logits = self.algorithm.logits(model, v, batch.x)
            if model.loss.targets == "tokens":
                return _token_scores(logits, batch.y), logits
            loss = model.loss.each(logits, batch.y).double()
            is_nan = logits.isnan().any(1)  # argmax makes a class of it
            if model.loss.targets == "classes":
                is_correct = ((logits.argmax(1) == batch.y) & ~is_nan).double()
            else:
                is_correct = torch.full_like(loss, torch.nan)
            return torch.stack([is_correct, loss, is_nan.double()], 1), logits  # [B, 3], [B, k]

        sizes = torch.tensor([self.feed.test_size(c) for c in ids])
        counts_tokens = model.loss.targets == "tokens"
        total = torch.zeros(len(ids), 3 + counts_tokens, dtype=torch.float64, device=self.device)
        predictions: list[tuple[Tensor, Tensor]] = []
        for test_range in self._test_batches(int(sizes.max()), len(ids)):
            batch = self.feed.test_batch(ids, test_range[0], len(test_range))
            if self.stacked:
                axes = tuple(None if value is None else 0 for value in batch)
                score, logits = vmap(score_one, in_dims=(shared_axis, 0, *axes))(
                    v.shared, v.personal, *batch
                )
            else:
                one = (value if value is None else value[0] for value in batch)
                score, logits = (part[None] for part in score_one(v.shared, v.personal, *one))
            if self.metrics and not counts_tokens:
                predictions.append((logits, batch.y))
            if batch.real is not None:
                score = score * batch.real.unsqueeze(-1)
            total += score.sum(1)
        if counts_tokens:
            scores = total[:, :3] / total[:, 3:]
            return torch.cat([scores, *(scores[:, 1:2].exp() for _ in self.metrics)], 1)
        scores = total / to_device(sizes, self.device).unsqueeze(1)
        if not predictions:
            missing = scores.new_full((len(ids), len(self.metrics)), torch.nan)
            return torch.cat([scores, missing], 1) if self.metrics else scores
        return torch.cat([scores, to_device(self._metrics(predictions, sizes), self.device)], 1)

    def _metrics(self, predictions: Sequence[tuple[Tensor, Tensor]], sizes: Tensor) -> Tensor:
        """The metrics [C, m] of clients with so many test samples each, on the host.

        predictions: outputs [C, B, k] and targets of each test batch.
        """
        outputs, y = to_host([torch.cat(parts, 1) for parts in zip(*predictions, strict=True)])
        rows = [
            compute_metrics(self.metrics, outputs[c, :size].double().numpy(), y[c, :size].numpy())
            for c, size in enumerate(sizes.tolist())
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _test_batches(self, samples: int, clients: int) -> Sequence[Sequence[int]]:
        """The positions of each test batch.

        Where a network's results depend on the batches, these are equal parts, so that none is a
        remainder of one.
        """
        if self.model.couples:
            return equal_parts(range(samples), _TEST_BATCH)
        outputs = self.model.shape[0] if self.model.loss.targets == "tokens" else 1
        width = max(1, _TEST_BATCH // (clients * outputs))
        return [range(samples)[first : first + width] for first in range(0, samples, width)]

    def _run_items(
        self,
        ids: Sequence[int],
        received: Variables,
        round_: int,
        items: Sequence[Phase | Visit],
    ) -> tuple[Variables, Variables, Tensor]:
        """Run ``items`` on the ``received`` variables; the variables before the first phase, those
        at the end, and the losses [C] of the last epoch.
        """
        numbers = [number for number, item in enumerate(items) if isinstance(item, Phase)]
        first_phase = numbers[0] if numbers else 0
        start = received
        for visit in items[:first_phase]:
            assert isinstance(visit, Visit)
            start = self._visit(ids, visit, start, start)
        now, loss_C, epochs = start, torch.zeros(len(ids), device=self.device), 0
        for number, item in enumerate(items[first_phase:], first_phase):
            if isinstance(item, Visit):
                now = self._visit(ids, item, start, now)
                continue
            if number == first_phase or isinstance(items[number - 1], Visit):
                now = tmap_vars(self._trainable_copy, now)  # a visit may return what others hold
            loss_C, epochs = self._run_phase(ids, item, start, now, round_, loss_C, epochs)
        return start, now, loss_C

    @torch.no_grad()
    def _visit(
        self, ids: Sequence[int], visit: Visit, start: Variables, now: Variables
    ) -> Variables:
        """What ``visit`` makes of the variables of these clients."""
        data = self.feed.unshuffled_batch(ids, all_samples=visit.all_data)
        if not self.stacked:
            return visit.apply(start, now, Batch._make(v if v is None else v[0] for v in data))
        axes = 0, 0, tuple(None if v is None else 0 for v in data)
        return vmap(lambda s, n, d: visit.apply(s, n, Batch._make(d)), in_dims=axes)(
            start, now, tuple(data)
        )

    def _received_variables(
        self, shared: Tree, personal_C: Tree, members: Sequence[int]
    ) -> Variables:
        """The variables of these clients as they arrive, [C, ...] in a stack; copies if the network
        writes to its parameters.
        """
        shared = self.transport.download(self._to_device(shared))
        if self.stacked:
            shared = tmap(lambda v: v.expand(len(members), *v.shape), shared)
        v = Variables(shared, self._personal_rows(personal_C, members))
        return tmap_vars(torch.clone, v) if self.model.effects.written_parameters else v

    def _personal_rows(self, personal_C: Tree, members: Sequence[int]) -> Tree:
        """The personal variables of these clients, [C, ...] in a stack."""
        selection = slice(members[0], members[-1] + 1) if self.stacked else members[0]
        return self._to_device({n: v[selection] for n, v in personal_C.items()})

    def _trainable_copy(self, v: Tensor) -> Tensor:
        """A copy that training may write to.

        Convolution weights of one client are in channels_last, which is 1.5 times as fast for
        CIFAR-size ResNets.
        """
        channels_last = v.dim() == 4 and not self.stacked
        return v.clone(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )

    def _to_device(self, tree: Tree) -> Tree:
        return tmap(lambda v: to_device(v, self.device), tree)

    def _run_phase(
        self,
        ids: Sequence[int],
        phase: Phase,
        start: Variables,
        now: Variables,
        round_: int,
        loss_C: Tensor,
        epochs: int,
    ) -> tuple[Tensor, int]:
        """Train ``now`` in place. Returns the losses [C] of the last epoch, ``loss_C`` if there is
        none, and the number of epochs so far.

        Epochs are numbered over the phases. A phase without epochs, or with its own stream, leaves
        the batches of the others as they are.
        """
        if phase.epochs == 0:
            return loss_C, epochs
        runner = (self.graphs.runner_for if self.graphs else PhaseRunner)(
            self, phase, start, now, len(ids)
        )
        for epoch in range(phase.epochs):
            address = f"{phase.stream} {epoch}" if phase.stream else epochs
            loss_C = self._run_epoch(runner, ids, round_, address)
            epochs += not phase.stream
        runner.end()
        return loss_C, epochs

    def _run_epoch(
        self, runner: PhaseRunner, ids: Sequence[int], round_: int, address: int | str
    ) -> Tensor:
        """One pass of every client over its own data; mean loss of each client, [C]."""
        sizes = [
            used_samples(self.algorithm, runner.phase, self.feed.train_size(client))
            for client in ids
        ]
        epoch = self.feed.epoch(
            ids, round_, address, self.algorithm.held_out, runner.phase.held_out
        )
        # unused samples count as padding
        return runner.run_epoch(epoch if sizes == list(epoch.sizes) else epoch.truncate(sizes))


def _token_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each text [B, 4] float64: right tokens, sum of losses, tokens with a NaN logit, tokens.

    logits: [B, L, V], targets: [B, L].
    """
    has_target, is_nan = targets != IGNORED, logits.isnan().any(-1)
    is_right = (logits.argmax(-1) == targets) & has_target & ~is_nan
    losses, count = token_losses(logits, targets)
    columns = is_right.sum(-1), losses, (is_nan & has_target).sum(-1), count
    return torch.stack([column.double() for column in columns], -1)
