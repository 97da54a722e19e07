"""How long a round takes, from unit costs: arithmetic alone, nothing is measured here."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..core.scheduling import assign
from ..core.tree import nbytes, numel
from ..federation.federation import Run
from ..run.assembly import Built

_ROUNDS = 16  # cohorts that are drawn to know the slowest worker of a small one
_POLL = 1e-3  # seconds by which a wait oversleeps a message, see ``comm.Mpi``


class Priced(Protocol):
    """Seconds of clients that compute together."""

    def of(self, sizes: Sequence[int], batch_size: int) -> float: ...


class Unit(NamedTuple):
    """What clients of one kind cost, seconds."""

    train: Priced  # training, upload and its exact addition
    tune: Priced  # before an evaluation
    score: Priced  # of test samples, in one batch
    add: float  # of what another rank's upload stands for, and its addition


class Costs(NamedTuple):
    """What else a run costs, seconds."""

    units: Mapping[int, Unit]  # of each kind that clients have
    begin: float  # of a round, on every rank
    close: float  # of a round, on every rank, after the message: the mean, the server's step
    vectors: float  # of a round, of the server's singular vectors, which the ranks share
    mix: tuple[float, float]  # of a round: for each client of the cohort, and for each pair
    log: float  # of a round
    checkpoint: float  # of one, without its bytes and the files of clients
    file: float  # of each of these
    byte: float  # of each byte of a checkpoint
    add_byte: float  # of each byte of a message that is added up in memory
    resident: int  # peak bytes of this process, with the data and one stack


class Machine(NamedTuple):
    """Where ranks run."""

    cores: float  # that compute at once; infinite: one for each rank
    bandwidth: float  # bytes/s of a message
    latency: float  # seconds of a message


class Seconds(NamedTuple):
    """Of a round, by stage; those of files are the mean over rounds with and without a checkpoint."""

    train: float
    exchange: float
    evaluate: float
    files: float
    busy: float  # of the workers' time, the fraction in which they train

    @property
    def round(self) -> float:
        return self.train + self.exchange + self.evaluate + self.files


def forecast(
    built: Built, costs: Costs, workers: Sequence[int], ranks: int, machine: Machine
) -> Seconds:
    """The seconds of a round of the first task, mean over the first rounds, the slowest rank of
    each.
    """
    run, config = built.run.of_round(0), built.config
    host = assign(run.costs, workers)
    crowd = max(1.0, len(workers) * config.engine.threads / machine.cores)
    all_ranks = max(1.0, ranks * config.engine.threads / machine.cores)
    first = config.data.tasks.rounds if config.data.tasks else config.rounds
    rounds = 1 if config.participation == 1 else min(_ROUNDS, config.rounds, first)
    judged = 1 / config.evaluate.every
    trained, busy, exchanged, evaluated = [], [], [], []
    for round_ in range(rounds):
        chosen = run.chosen(round_)
        loads = _loads(built, run, costs, chosen, host, workers, judged)
        trained.append(costs.begin + max(loads))
        at = chosen if run.judges_cohort else range(len(run.sizes))
        evaluated.append(max(_evaluation(built, run, costs, at, host, workers)))
        busy.append(sum(loads) / (len(loads) * max(max(loads), 1e-12)))
        exchanged.append(_exchange(run, costs, chosen, ranks, len(workers), machine, all_ranks))

    def mean(values):
        return float(np.mean(values))

    evaluate = mean(evaluated) * crowd * judged
    files = costs.log + _checkpoint(run, costs, host, workers) / config.checkpoint.every
    return Seconds(mean(trained) * crowd, mean(exchanged), evaluate, files, mean(busy))


def allreduce(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of an allreduce: 2 (R - 1) / R of the bytes through each rank (Thakur, Rabenseifner,
    Gropp 2005).
    """
    if ranks == 1:
        return 0.0
    through = 2 * (ranks - 1) / ranks * bytes_ / machine.bandwidth
    return through + 2 * math.ceil(math.log2(ranks)) * machine.latency + _POLL


def allgather(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds until every rank has all ``bytes_``."""
    if ranks == 1:
        return 0.0
    return (
        (ranks - 1) / ranks * bytes_ / machine.bandwidth
        + math.ceil(math.log2(ranks)) * machine.latency
        + _POLL
    )


def _loads(
    built: Built,
    run: Run,
    costs: Costs,
    chosen: frozenset[int],
    host: Sequence[int],
    workers: Sequence[int],
    judged: float,
) -> list[float]:
    """Seconds of training of each worker, with the score after it in such a fraction of the rounds."""
    load, batch_size = dict.fromkeys(workers, 0.0), built.config.train.batch_size
    for group, rank in zip(run.groups, host, strict=True):
        unit, stacks = (
            costs.units[run.kind_of[group[0]]],
            _stacks(run, [c for c in group if c in chosen]),
        )
        for stack in stacks:
            load[rank] += unit.train.of([run.sizes[c] for c in stack], batch_size)
            load[rank] += judged * _score(built, unit, stack)
    return list(load.values())


def _evaluation(
    built: Built,
    run: Run,
    costs: Costs,
    judged: Collection[int],
    host: Sequence[int],
    workers: Sequence[int],
) -> list[float]:
    """Seconds in which each worker judges its clients of these."""
    load, batch_size = dict.fromkeys(workers, 0.0), built.config.train.batch_size
    for group, rank in zip(run.groups, host, strict=True):
        unit = costs.units[run.kind_of[group[0]]]
        for stack in _stacks(run, [c for c in group if c in judged]):
            load[rank] += unit.tune.of([run.sizes[c] for c in stack], batch_size) + _score(
                built, unit, stack
            )
    return list(load.values())


def _score(built: Built, unit: Unit, stack: Sequence[int]) -> float:
    tests = [len(built.split.test[c]) for c in stack]
    return unit.score.of(tests, max(tests))


def _stacks(run: Run, clients: Sequence[int]) -> list[list[int]]:
    """Clients that compute at once."""
    stacks = run.stacks(clients) if clients else []
    return stacks if run.trainer.stacked else [[c] for stack in stacks for c in stack]


def _exchange(
    run: Run,
    costs: Costs,
    chosen: frozenset[int],
    ranks: int,
    workers: int,
    machine: Machine,
    crowd: float,
) -> float:
    """Seconds between the last client's training and the evaluation."""
    own, several = costs.close * crowd, ranks > 1
    own += costs.vectors * (crowd / ranks if several else 1.0)
    if run.gathers and several:
        sent = 4 * sum(numel(run.kinds[run.kind_of[c]].upload) for c in chosen)
        # the server, which has none of its own
        others = sum(costs.units[run.kind_of[c]].add for c in chosen)
        own += allgather(sent, ranks, machine) + others * crowd
    elif several:
        message = run.unit * run.upload.size
        own += (
            allreduce(message, ranks, machine)
            + (ranks - 1) / ranks * message * costs.add_byte * crowd
        )
    if run.mixing:
        each, pair = costs.mix
        clients = len(chosen)
        own += (each * clients + pair * clients**2) / (workers if len(run.mixing.owners) > 1 else 1)
        own += allgather(run.mixing.bytes_mpi(clients, ranks), ranks, machine)
    return own


def _checkpoint(run: Run, costs: Costs, host: Sequence[int], workers: Sequence[int]) -> float:
    """Seconds of a checkpoint: every worker its clients at the same time, a file of each kind, then
    rank 0 the rest.
    """
    own, files = dict.fromkeys(workers, 0), set()
    for group, rank in zip(run.groups, host, strict=True):
        files |= {(rank, run.kind_of[c]) for c in group}
        own[rank] += sum(nbytes(run.kinds[run.kind_of[c]].first.personal) for c in group)
    shared = nbytes(run.kinds[0].first.shared)
    return costs.checkpoint + costs.file * len(files) + costs.byte * (max(own.values()) + shared)
