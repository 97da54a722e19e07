"""What share of a round is not forward pass, backward pass and optimiser step? Target: under 3 %.

    python benchmarks/overhead.py [--seconds 60]

Whole rounds of FedAvg (order of samples, batches, training, upload, exact sum, mean,
evaluation) on one core. A clock runs within each round while the engine's steps and the
evaluation's forward passes do: `overhead` is the rest, `with evaluation` counts those passes as
overhead too. The median over rounds, of which there are at least three and as many as fit in
`--seconds`, after one that warms up. Correctness first: the steps alone, on batches gathered one by
one beforehand, end at the weights of the round, to the bit.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from report import arguments, tell
from throughput import WORKLOADS, prepare

from fedlora_mpi.algorithm import Batch, Variables
from fedlora_mpi.core.tree import Tree
from fedlora_mpi.engine.train import PhaseRunner, Trainer
from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round

SMALL = {
    "50 clients, 28x28": (
        {"dataset": "synthetic",
         "synthetic": {"size": 28, "channels": 1, "train": 2500, "test": 100},
         "partition": {"kind": "iid", "clients": 50, "train": 50, "test": 2}},
        "cnn", {"epochs": 1, "batch_size": 10, "lr": 0.01}, "auto", None,
    ),
}  # fmt: skip


class Clock:
    """Seconds that methods take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, owner: type, name: str) -> None:
        """Run from now on while ``owner.name`` does."""
        own = getattr(owner, name)

        def timed(*given, **named):
            begin = time.perf_counter()
            try:
                return own(*given, **named)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(owner, name, timed)


def gathered(trainer: Trainer, clients: Sequence[int]) -> list[tuple[int, Batch]]:
    """(clients that still train, batch) of every step of a round."""
    feed, settings, steps = trainer.feed, trainer.settings, []
    sizes = [feed.train_size(c) for c in clients]
    for number in range(settings.epochs):
        epoch = feed.epoch(clients, 0, number)
        for first in range(0, sizes[0], settings.batch_size):
            count = sum(size > first for size in sizes)
            steps.append(
                (count, epoch.batch(count, first, min(settings.batch_size, sizes[0] - first)))
            )
    return steps


def alone(trainer: Trainer, shared: Tree, clients: Sequence[int]) -> Tree:
    """Shared variables [C, ...] at the end of the steps of clients that compute together."""
    spread = (lambda v: v.expand(len(clients), *v.shape)) if trainer.stacked else (lambda v: v)
    form = torch.contiguous_format if trainer.stacked else torch.channels_last

    def copy(v):
        return spread(v).clone(memory_format=form if v.dim() == 4 else torch.contiguous_format)

    (phase,) = trainer.local(0)
    start, now = (
        Variables({n: spread(v) for n, v in shared.items()}, {}),
        Variables({n: copy(v) for n, v in shared.items()}, {}),
    )
    walk = PhaseRunner(trainer, phase, start, now, len(clients))
    for count, batch in gathered(trainer, clients):
        walk.run_batch(batch, count)
    return now.shared


def check(trainer: Trainer, state: State, stack: Sequence[int]) -> None:
    """The steps alone must do what a round does."""
    shared = alone(trainer, state.shared, stack)
    for row, done in enumerate(trainer.train(stack, state.shared, {}, 0)):
        for name, value in done.end.shared.items():
            own = shared[name][row] if trainer.stacked else shared[name]
            assert torch.equal(own, value), (
                f"client {done.client}, {name}: other weights than in a round"
            )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of each workload (default 60)")
    asked, rows = parser.parse_args(), []
    steps, passes = Clock(), Clock()
    steps.on(PhaseRunner, "run_batch")
    passes.on(Trainer, "_scores")
    for name, (data, model, train, group_size, _) in (WORKLOADS | SMALL).items():
        built, state = prepare(data, model, train, group_size=group_size)
        federation = built.federation
        clients, placement = federation.clients, federation.placement
        trainer = clients.trainer
        stack = placement.split_into_stacks(placement.groups[0], clients)[0]
        check(trainer, state, stack if trainer.stacked else stack[:1])
        shares, until = [], time.perf_counter() + asked.seconds
        while len(shares) < 4 or time.perf_counter() < until:  # the first warms up
            steps.seconds = passes.seconds = 0.0
            begin = time.perf_counter()
            run_round(federation, State(0, *state[1:]), evaluate=True, stop=False)
            whole = time.perf_counter() - begin
            shares.append(
                (whole, 1 - (steps.seconds + passes.seconds) / whole, 1 - steps.seconds / whole)
            )
        whole, overhead, both = map(statistics.median, zip(*shares[1:], strict=True))
        row = {
            "workload": name,
            "path": built.config.engine.path,
            "rounds": len(shares) - 1,
            "s/round": whole,
        }
        rows.append(row | {"overhead": overhead, "with evaluation": both, "target": 0.03})
    tell(asked, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
