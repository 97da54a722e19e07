"""How long a round takes, from unit costs: arithmetic alone, nothing is measured here."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..core.scheduling import assign_groups
from ..core.tree import nbytes, numel
from ..federation.federation import Run
from ..run.assembly import Assembly

_ROUNDS = 16  # cohorts that are drawn to know the slowest worker of a small one
_POLL_SECONDS = 1e-3  # seconds by which a wait oversleeps a message, see ``comm.Mpi``


class CostModel(Protocol):
    """Seconds of clients that compute together."""

    def cost(self, sizes: Sequence[int], batch_size: int) -> float: ...


class UnitCosts(NamedTuple):
    """What clients of one kind cost, seconds."""

    train: CostModel  # training, upload and its exact addition
    tune: CostModel  # before an evaluation
    score: CostModel  # of test samples, in one batch
    add: float  # of what another rank's upload stands for, and its addition


class Costs(NamedTuple):
    """What else a run costs, seconds."""

    units: Mapping[int, UnitCosts]  # of each kind that clients have
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
    """Of a round, by stage. Those of files are a mean over rounds, few of which checkpoint."""

    train: float
    exchange: float
    evaluate: float
    files: float
    busy_fraction: float  # of the workers' time, the fraction in which they train

    @property
    def round(self) -> float:
        return self.train + self.exchange + self.evaluate + self.files


def forecast(
    assembly: Assembly, costs: Costs, workers: Sequence[int], ranks: int, machine: Machine
) -> Seconds:
    """The seconds of a round of the first task, mean over the first rounds, the slowest rank of
    each.
    """
    run, config = assembly.run.for_round(0), assembly.config
    host = assign_groups(run.costs, workers)
    worker_slowdown = max(1.0, len(workers) * config.engine.threads / machine.cores)
    rank_slowdown = max(1.0, ranks * config.engine.threads / machine.cores)
    task_rounds = config.data.tasks.rounds if config.data.tasks else config.rounds
    rounds = 1 if config.participation == 1 else min(_ROUNDS, config.rounds, task_rounds)
    evaluated_fraction = 1 / config.evaluate.every
    train_seconds, busy_fractions, exchange_seconds, evaluate_seconds = [], [], [], []
    for round_ in range(rounds):
        chosen = run.sample_cohort(round_)
        loads = _training_loads(assembly, run, costs, chosen, host, workers, evaluated_fraction)
        train_seconds.append(costs.begin + max(loads))
        evaluated_clients = chosen if run.evaluate_cohort_only else range(len(run.sizes))
        evaluate_seconds.append(
            max(_evaluation_loads(assembly, run, costs, evaluated_clients, host, workers))
        )
        busy_fractions.append(sum(loads) / (len(loads) * max(max(loads), 1e-12)))
        exchange_seconds.append(
            _exchange_seconds(run, costs, chosen, ranks, len(workers), machine, rank_slowdown)
        )

    def mean(values):
        return float(np.mean(values))

    evaluate = mean(evaluate_seconds) * worker_slowdown * evaluated_fraction
    files = costs.log + _checkpoint_seconds(run, costs, host, workers) / config.checkpoint.every
    return Seconds(
        mean(train_seconds) * worker_slowdown,
        mean(exchange_seconds),
        evaluate,
        files,
        mean(busy_fractions),
    )


def allreduce(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of an allreduce: 2 (R - 1) / R of the bytes through each rank (Thakur, Rabenseifner,
    Gropp 2005).
    """
    if ranks == 1:
        return 0.0
    transfer = 2 * (ranks - 1) / ranks * bytes_ / machine.bandwidth
    return transfer + 2 * math.ceil(math.log2(ranks)) * machine.latency + _POLL_SECONDS


def allgather(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds until every rank has all ``bytes_``."""
    if ranks == 1:
        return 0.0
    return (
        (ranks - 1) / ranks * bytes_ / machine.bandwidth
        + math.ceil(math.log2(ranks)) * machine.latency
        + _POLL_SECONDS
    )


def _training_loads(
    assembly: Assembly,
    run: Run,
    costs: Costs,
    chosen: frozenset[int],
    host: Sequence[int],
    workers: Sequence[int],
    evaluated_fraction: float,
) -> list[float]:
    """Seconds of training of each worker; a fraction of the rounds is evaluated after it."""
    load, batch_size = dict.fromkeys(workers, 0.0), assembly.config.train.batch_size
    for group, rank in zip(run.groups, host, strict=True):
        unit, stacks = (
            costs.units[run.kind_of[group[0]]],
            _stacks(run, [c for c in group if c in chosen]),
        )
        for stack in stacks:
            load[rank] += unit.train.cost([run.sizes[c] for c in stack], batch_size)
            load[rank] += evaluated_fraction * _score_seconds(assembly, unit, stack)
    return list(load.values())


def _evaluation_loads(
    assembly: Assembly,
    run: Run,
    costs: Costs,
    evaluated_clients: Collection[int],
    host: Sequence[int],
    workers: Sequence[int],
) -> list[float]:
    """Seconds in which each worker judges its clients of these."""
    load, batch_size = dict.fromkeys(workers, 0.0), assembly.config.train.batch_size
    for group, rank in zip(run.groups, host, strict=True):
        unit = costs.units[run.kind_of[group[0]]]
        for stack in _stacks(run, [c for c in group if c in evaluated_clients]):
            load[rank] += unit.tune.cost(
                [run.sizes[c] for c in stack], batch_size
            ) + _score_seconds(assembly, unit, stack)
    return list(load.values())


def _score_seconds(assembly: Assembly, unit: UnitCosts, stack: Sequence[int]) -> float:
    tests = [len(assembly.split.test[c]) for c in stack]
    return unit.score.cost(tests, max(tests))


def _stacks(run: Run, clients: Sequence[int]) -> list[list[int]]:
    """Clients that compute at once."""
    stacks = run.split_into_stacks(clients) if clients else []
    return [list(s) for s in stacks] if run.trainer.stacked else [[c] for s in stacks for c in s]


def _exchange_seconds(
    run: Run,
    costs: Costs,
    chosen: frozenset[int],
    ranks: int,
    workers: int,
    machine: Machine,
    slowdown: float,
) -> float:
    """Seconds between the last client's training and the evaluation."""
    seconds, has_peers = costs.close * slowdown, ranks > 1
    seconds += costs.vectors * (slowdown / ranks if has_peers else 1.0)
    if run.gather_uploads and has_peers:
        upload_bytes = 4 * sum(numel(run.kinds[run.kind_of[c]].untrained_upload) for c in chosen)
        # the server, which has none of its own
        add_seconds = sum(costs.units[run.kind_of[c]].add for c in chosen)
        seconds += allgather(upload_bytes, ranks, machine) + add_seconds * slowdown
    elif has_peers:
        message = run.number_bytes * run.upload_layout.size
        seconds += (
            allreduce(message, ranks, machine)
            + (ranks - 1) / ranks * message * costs.add_byte * slowdown
        )
    if run.mixing:
        per_client, per_pair = costs.mix
        clients = len(chosen)
        seconds += (per_client * clients + per_pair * clients**2) / (
            workers if len(run.mixing.owners) > 1 else 1
        )
        seconds += allgather(run.mixing.bytes_mpi(clients, ranks), ranks, machine)
    return seconds


def _checkpoint_seconds(
    run: Run, costs: Costs, host: Sequence[int], workers: Sequence[int]
) -> float:
    """Seconds of a checkpoint: every worker its clients at the same time, a file of each kind, then
    rank 0 the rest.
    """
    personal_bytes, files = dict.fromkeys(workers, 0), set()
    for group, rank in zip(run.groups, host, strict=True):
        files |= {(rank, run.kind_of[c]) for c in group}
        personal_bytes[rank] += sum(
            nbytes(run.kinds[run.kind_of[c]].initial.personal) for c in group
        )
    shared = nbytes(run.kinds[0].initial.shared)
    return (
        costs.checkpoint
        + costs.file * len(files)
        + costs.byte * (max(personal_bytes.values()) + shared)
    )
