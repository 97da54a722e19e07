"""What share of a round is not forward pass, backward pass and optimiser step? Target: under 3 %.

    python benchmarks/overhead.py [--seconds 60]

Whole rounds of `play` under FedAvg (order of samples, batches, training, upload, exact sum, mean, evaluation) against
the same steps alone on the same batches, which are gathered before the clock starts, in turn on one core. Evaluation
is forward passes and is timed alone as well: `overhead` is what is left, `with evaluation` counts that as overhead too.
The median over pairs, of which there are at least three and as many as fit in `--seconds`. Correctness first: the steps
alone end at the weights of the round, to the bit.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from report import arguments, tell
from throughput import WORKLOADS, prepare

from fedlora_mpi.algorithm import Batch, Vars
from fedlora_mpi.engine.train import Walk
from fedlora_mpi.federation import State
from fedlora_mpi.round import play
from fedlora_mpi.tree import Tree


def gathered(trainer, clients: Sequence[int]) -> list[tuple[int, Batch]]:
    """(clients that still train, batch) of every step of a round."""
    feed, settings, steps = trainer.feed, trainer.settings, []
    sizes = [feed.train_size(c) for c in clients]
    for number in range(settings.epochs):
        epoch = feed.epoch(clients, 0, number)
        for first in range(0, sizes[0], settings.batch_size):
            count = sum(size > first for size in sizes)
            steps.append((count, epoch.batch(count, first, min(settings.batch_size, sizes[0] - first))))
    return steps


def alone(trainer, shared: Tree, clients: Sequence[int], steps: list[tuple[int, Batch]]) -> tuple[float, Tree]:
    """(seconds of the steps, shared variables [C, ...] at the end) of clients that compute together."""
    spread = (lambda v: v.expand(len(clients), *v.shape)) if trainer.stacked else (lambda v: v)
    form = torch.contiguous_format if trainer.stacked else torch.channels_last
    copy = lambda v: spread(v).clone(memory_format=form if v.dim() == 4 else torch.contiguous_format)
    (phase,) = trainer.algorithm.phases(trainer.model, trainer.settings, 0)
    start, now = Vars({n: spread(v) for n, v in shared.items()}, {}), Vars({n: copy(v) for n, v in shared.items()}, {})
    walk = Walk(trainer, phase, start, now, len(clients))
    begin = time.perf_counter()
    for count, batch in steps:
        walk.play(batch, count)
    return time.perf_counter() - begin, now.shared


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of each workload (default 60)")
    asked, rows = parser.parse_args(), []
    for name, (data, model, train, group_size, _) in WORKLOADS.items():
        built, state = prepare(data, model, train, group_size=group_size)
        run, trainer = built.run, built.run.trainer
        stacks = [stack for group in run.groups for stack in run.stacks(group)]
        stacks = stacks if trainer.stacked else [[c] for stack in stacks for c in stack]
        steps = {tuple(stack): gathered(trainer, stack) for stack in stacks}
        check(trainer, state, stacks[0], steps)
        rounds, shares, judged, until = [], [], [], time.perf_counter() + asked.seconds
        while len(shares) < 4 or time.perf_counter() < until:  # the first warms up
            begin = time.perf_counter()
            play(run, State(0, *state[1:]), evaluate=True, stop=False)
            whole = time.perf_counter() - begin
            bare = sum(alone(trainer, state.shared, stack, steps[tuple(stack)])[0] for stack in stacks)
            begin = time.perf_counter()
            for stack in stacks:
                trainer.evaluate(stack, state.shared, {})
            passes = time.perf_counter() - begin
            rounds.append(whole)
            shares.append(1 - (bare + passes) / whole)
            judged.append(1 - bare / whole)
        rows.append(
            {
                "workload": name,
                "path": built.config.engine.path,
                "pairs": len(shares) - 1,
                "s/round": statistics.median(rounds[1:]),
                "overhead": statistics.median(shares[1:]),
                "with evaluation": statistics.median(judged[1:]),
                "target": 0.03,
                "difference": 0.0,
            }
        )
    tell(asked, rows)


def check(trainer, state: State, stack: Sequence[int], steps: dict) -> None:
    """The steps alone must do what a round does."""
    _, shared = alone(trainer, state.shared, stack, steps[tuple(stack)])
    for row, done in enumerate(trainer.train(stack, state.shared, {}, 0)):
        for name, value in done.end.shared.items():
            own = shared[name][row] if trainer.stacked else shared[name]
            assert torch.equal(own, value), f"client {done.client}, {name}: other weights than in a round"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
