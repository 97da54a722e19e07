"""What a config would cost, before anything is trained.

Sizes follow from the model and the partition. Time and memory are measured: one group takes two
batches of every epoch on throw-away copies, and the rest is proportion.
"""

import os
import resource
import time
from dataclasses import replace
from typing import NamedTuple


from .build import Built, build, hosts
from .comm import Solo
from .config import Config
from .data.feed import Feed
from .placement import assign
from .tree import nbytes, numel
from .units import duration, size

_BATCHES = 2  # of every epoch, in the trial


class Trial(NamedTuple):
    """What one group showed."""

    train: float  # seconds per sample and epoch
    evaluate: float  # seconds per test sample
    resident: int  # peak bytes of this process, with the data and one group


def plan(config: Config, source: str, ranks: int) -> str:
    """The costs of ``config`` on ``ranks`` ranks of this machine, as lines of text."""
    if ranks < 1:
        raise ValueError(f"--ranks = {ranks}: must be an integer of at least 1")
    workers = hosts(config, ranks)
    if not workers:
        raise ValueError(f"--ranks = {ranks}: server_hosts_clients = false needs at least 2")
    built = build(config, source, Solo())
    trial = _trial(built)
    lines = [f"{source} on {ranks} rank{'s' * (ranks > 1)} of this machine ({os.cpu_count()} cores)"]
    for title, text in (*_sizes(built, ranks), *_costs(built, ranks, list(workers), trial)):
        lines.append(f"  {title:<10} {text}")
    return "\n".join(lines)


def _sizes(built: Built, ranks: int) -> list[tuple[str, str]]:
    """Parameters and bytes."""
    config, run, first, model = built.config, built.run, built.first, built.run.trainer.model
    clients = len(run.weight_N)
    cohort = len(run.chosen(0))
    statistics = sum(v.numel() for n, v in model.initial.items() if model.role(n) == "stats")
    up, down, own = 4 * run.upload.size, nbytes(first.shared), nbytes(first.personal)
    message = {"exact": 16, "fast": 4}[config.reduce] * run.upload.size
    return [
        ("model", f"{config.model.name}: {numel(model.initial) - statistics:,} parameters, {statistics:,} running "
                  f"statistics, {model.flops / 1e6:.1f} MFLOP forward per sample"),
        ("shared", f"{run.upload.size:,} numbers: {size(up)} up, {size(down)} down per client and round"),
        ("personal", f"{numel(first.personal):,} numbers, {size(own)} per client; {size(own * clients)} in a checkpoint"),
        ("round", f"{cohort} of {clients} clients: {size(up * cohort)} up, {size(down * cohort)} down; "
                  + (f"an allreduce of {size(message)} per rank" if ranks > 1 else "no message, one rank")),
    ]


def _costs(built: Built, ranks: int, workers: list[int], trial: Trial) -> list[tuple[str, str]]:
    """Memory and time."""
    config, run = built.config, built.run
    split = built.split
    share = len(run.chosen(0)) / len(run.weight_N)
    train = [len(indices) * config.train.epochs * trial.train * share for indices in split.train]
    test = [len(indices) * trial.evaluate / config.evaluate.every for indices in split.test]
    costs = [sum(train[c] + test[c] for c in group) for group in run.groups]
    host = assign([sum(len(split.train[c]) for c in group) for group in run.groups], workers)
    load = {rank: sum(cost for cost, h in zip(costs, host) if h == rank) for rank in workers}
    hosted = {rank: sum(len(g) for g, h in zip(run.groups, host) if h == rank) for rank in workers}
    crowd = max(1.0, len(workers) * config.engine.threads / (os.cpu_count() or 1))
    seconds = max(load.values()) * crowd
    message = (16 if config.reduce == "exact" else 4) * run.upload.size * 2
    peak = trial.resident + max(hosted.values()) * nbytes(built.first.personal) + message
    rest = sum(load.values()) / (len(load) * max(load.values()))
    return [
        ("engine", f"{config.engine.path} on {config.engine.device}, {len(run.groups)} groups of up to "
                   f"{config.engine.group_size}, {len(workers)} workers, {rest:.0%} balanced"),
        ("memory", f"{size(peak)} for the worker with most clients ({max(hosted.values())})"),
        ("time", f"{duration(seconds)} per round, {duration(seconds * config.rounds)} for {config.rounds} rounds"),
    ]


def _trial(built: Built) -> Trial:
    """Train two batches of every epoch of the first group, twice: the first warms up."""
    run, settings = built.run, built.config.train
    group = run.groups[0]
    short = _BATCHES * settings.batch_size
    trainer = replace(run.trainer, feed=_Short(run.trainer.feed, short))
    rows = {n: v.expand(len(group), *v.shape) for n, v in built.first.personal.items()}
    for _ in range(2):
        begin = time.perf_counter()
        for _ in trainer.train(group, built.first.shared, rows, 0):
            pass
        middle = time.perf_counter()
        trainer.evaluate(group, built.first.shared, rows)
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
