"""What a config would cost, before anything is trained.

Sizes follow from the model and the partition. Time and memory are measured: one group takes two
batches of every epoch on throw-away copies, and the rest is proportion.
"""

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from .algorithm import Cohort, Vars
from .build import Built, build, hosts
from .comm import Solo
from .config import Config
from .data.feed import Feed
from .federation import Kind, Run
from .placement import assign
from .tree import Tree, nbytes, numel, tmap
from .units import duration, size

_BATCHES = 2  # of every epoch, in the trial
_COLUMNS = 20  # of the log, about
_LOG, _FILES = 120_000, 60_000  # bytes of a log and of a checkpoint's files beside the numbers in them


class Trial(NamedTuple):
    """What one group showed."""

    train: float  # seconds per sample and epoch
    evaluate: float  # seconds per test sample
    resident: int  # peak bytes of this process, with the data and one group


def plan(config: Config, source: str, ranks: int) -> str:
    """The costs of ``config`` on ``ranks`` ranks of this machine, as lines of text; the time is that of the first
    task's rounds."""
    if ranks < 1:
        raise ValueError(f"--ranks = {ranks}: must be an integer of at least 1")
    workers = hosts(config, ranks)
    if not workers:
        raise ValueError(f"--ranks = {ranks}: server_hosts_clients = false needs at least 2")
    built = build(config, source, Solo())
    trials = {number: _trial(built, number) for number in sorted(set(built.run.kind_of))}
    lines = [f"{source} on {ranks} rank{'s' * (ranks > 1)} of this machine ({os.cpu_count()} cores)"]
    for title, text in (*_sizes(built, ranks), *_privacy(built), *_costs(built, ranks, list(workers), trials)):
        lines.append(f"  {title:<10} {text}")
    return "\n".join(lines)


def storage(built: Built) -> int:
    """Bytes that the run folder comes to: the kept checkpoints and one in the making, each with a log, and the log."""
    config, run, split = built.config, built.run, built.split
    first = run.kinds[0].first.shared
    personal = sum(nbytes(run.kinds[kind].first.personal) for kind in run.kind_of)
    state = _FILES + personal + nbytes(first) + nbytes(run.algorithm.server(run.trainer.model, first))
    samples = sum(map(len, (*split.train, *split.test)))
    log = _LOG + 8 * (samples + config.rounds * (_COLUMNS + 2 * len(run.weight_N)))
    copies = config.checkpoint.keep + 1
    return copies * state + (copies + 1) * log


def _sizes(built: Built, ranks: int) -> list[tuple[str, str]]:
    """Parameters and bytes."""
    config, run = built.config, built.run
    first, clients, cohort = run.kinds[0].first, len(run.weight_N), _cohort(run)
    second = _second(run)
    traffic = [_traffic(run, kind, second) for kind in run.kinds]
    up, down = zip(*(traffic[kind] for kind in run.kind_of))
    message, how = {"exact": 16, "fast": 4}[config.reduce] * run.upload.size, "an allreduce"
    if run.gathers:
        message, how = 4 * sum(numel(run.kinds[kind].upload) for kind in run.kind_of) * cohort // clients, "a gather"
    own = [numel(run.kinds[kind].first.personal) for kind in run.kind_of]
    total, comma = 4 * sum(own), "{:,}".format
    return [
        *(("model", _model(run, n, config.model.mix[n].name)) for n in sorted({kind.network for kind in run.kinds})),
        ("shared", f"{numel(first.shared):,} numbers; {_range(up, size)} up, {_range(down, size)} down per client and round"),
        ("personal", f"{_range(own, comma)} numbers per client; {size(total)} in a checkpoint"),
        ("round", f"{cohort} of {clients} clients: {size(sum(up) * cohort // clients)} up, {size(sum(down) * cohort // clients)} down; "
                  + (f"{how} of {size(message)} per rank" if ranks > 1 else "no message, one rank")),
    ]


def _cohort(run: Run) -> int:
    """How many clients a round has; where that is random, about."""
    return max(1, round(run.total(frozenset()))) if run.privacy.draws else len(run.chosen(0))


def _privacy(built: Built) -> list[tuple[str, str]]:
    """What all rounds together cost in differential privacy."""
    run, block, rounds = built.run, built.config.privacy, built.config.rounds
    if not block.differential:
        return []
    relation = "one client more or less" if block.draws else "another client in the place of one"
    said = f"epsilon {run.epsilon(rounds):.3g} at delta {block.delta:g} after {rounds} rounds, for {relation}"
    noise = block.deviation / run.total(run.chosen(0))
    return [("privacy", f"{said}; noise of deviation {noise:.2g} on each number of the mean")]


def _traffic(run: Run, kind: Kind, second: Tree) -> tuple[int, int]:
    """The most bytes that such a client sends and receives in a round; ``second``: what ``_second`` says."""
    ones = lambda tree: tmap(torch.ones_like, tree)  # of a method that sends by class: all classes
    full, first = Vars(*map(ones, kind.arrived[:2])), kind.first.shared
    up = 4 * max(int(kind.algorithm.sent(v, v)) for v in (kind.arrived, full))
    down = 4 * max(int(kind.algorithm.received(shared)) for shared in (first, ones(first), second))
    return (up + run.mixing.bytes_up, down + run.mixing.bytes_down) if run.mixing else (up, down)


def _second(run: Run) -> Tree:
    """The shared variables before round 2 if all of a cohort, clients of equal weight, came back untrained."""
    shared, kinds = run.kinds[0].first.shared, [run.kind_of[client] for client in run.chosen(0) or (0,)]
    terms = {kind: run.kinds[kind].term for kind in set(kinds)}
    mean = tmap(lambda *leaves: sum(leaves) / len(leaves), *(terms[kind] for kind in kinds))
    cohort = Cohort(len(kinds) / len(run.weight_N), len(kinds))
    return run.algorithm.serve(run.algorithm.server(run.trainer.model, shared), shared, mean, cohort)[1]


def _range(numbers: Sequence[int], said: Callable[[int], str]) -> str:
    """From the smallest to the largest, or the one that all are."""
    least, most = min(numbers), max(numbers)
    return said(most) if least == most else f"{said(least)} to {said(most)}"


def _model(run: Run, number: int, name: str) -> str:
    """What is known of a network."""
    having = [k for k, kind in enumerate(run.kinds) if kind.network == number]
    model, clients = run.kinds[having[0]].trainer.model, sum(kind in having for kind in run.kind_of)
    statistics = sum(v.numel() for n, v in model.initial.items() if model.role(n) == "stats")
    return (
        f"{name}: {numel(model.initial) - statistics:,} parameters, {statistics:,} running statistics, "
        f"{model.flops / 1e6:.1f} MFLOP forward per sample" + (f"; {clients} clients" if clients < len(run.kind_of) else "")
    )


def _costs(built: Built, ranks: int, workers: list[int], trials: dict[int, Trial]) -> list[tuple[str, str]]:
    """Memory and time."""
    config, run, split = built.config, built.run.of_round(0), built.split
    share = _cohort(run) / np.count_nonzero(run.sizes)
    trial = [trials[kind] for kind in run.kind_of]
    train = [n * config.train.epochs * t.train * share for n, t in zip(run.sizes, trial)]
    test = [len(at) * t.evaluate / config.evaluate.every for at, t in zip(split.test, trial)]
    costs = [sum(train[c] + test[c] for c in group) for group in run.groups]
    host = assign(run.costs, workers)
    load = {rank: sum(cost for cost, h in zip(costs, host) if h == rank) for rank in workers}
    clients = {rank: [c for g, h in zip(run.groups, host) if h == rank for c in g] for rank in workers}
    own = {rank: sum(nbytes(run.kinds[run.kind_of[c]].first.personal) for c in at) for rank, at in clients.items()}
    crowd = max(1.0, len(workers) * config.engine.threads / (os.cpu_count() or 1))
    seconds = max(load.values()) * crowd
    message = (16 if config.reduce == "exact" else 4) * run.upload.size * 2
    most = max(own, key=own.get)
    disk = f"{size(storage(built))} for {config.checkpoint.keep} checkpoints, one in the making, and the log"
    peak = max(t.resident for t in trials.values()) + own[most] + message
    rest = sum(load.values()) / (len(load) * max(load.values()))
    return [
        ("engine", f"{config.engine.path} on {config.engine.device}, {len(run.groups)} groups of up to "
                   f"{max(map(len, run.groups))}, {len(workers)} workers, {rest:.0%} balanced"),
        ("memory", f"{size(peak)} for the worker with most personal state ({len(clients[most])} clients)"),
        ("disk", disk),
        ("time", f"{duration(seconds)} per round, {duration(seconds * config.rounds)} for {config.rounds} rounds"),
    ]


def _trial(built: Built, number: int) -> Trial:
    """Train two batches of every epoch of the first clients of a kind, twice: the first warms up."""
    run, settings = built.run, built.config.train
    kind, group = run.kinds[number], run.stacks(next(g for g in run.groups if run.kind_of[g[0]] == number))[0]
    trainer = replace(kind.trainer, feed=_Short(kind.trainer.feed, _BATCHES * settings.batch_size))
    rows = {n: v.expand(len(group), *v.shape) for n, v in kind.first.personal.items()}
    for _ in range(2):
        begin = time.perf_counter()
        for _ in trainer.train(group, kind.first.shared, rows, 0):
            pass
        middle = time.perf_counter()
        trainer.evaluate(group, kind.first.shared, rows)
        end = time.perf_counter()
    samples = sum(trainer.feed.train_size(c) for c in group) * settings.epochs
    tests = sum(trainer.feed.test_size(c) for c in group)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Trial((middle - begin) / samples, (end - middle) / tests, resident)


class _Short:
    """A feed whose clients end after ``limit`` training samples."""

    def __init__(self, feed: Feed, limit: int) -> None:
        self._feed, self._limit = feed, limit
        self.epoch, self.test, self.test_size, self.survey = feed.epoch, feed.test, feed.test_size, feed.survey

    def train_size(self, client: int) -> int:
        return min(self._limit, self._feed.train_size(client))
