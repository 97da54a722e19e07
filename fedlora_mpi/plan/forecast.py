"""Compute how long a round takes from unit costs. This is arithmetic only; nothing is measured
here.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..core.scheduling import assign_groups
from ..core.tree import nbytes
from ..experiment.assembly import Assembly
from ..federation.clients import Clients
from ..federation.cohorts import Cohort
from ..federation.federation import Federation

_ROUNDS = 16  # cohorts sampled to estimate the slowest worker when participation is below 1
_POLL_SECONDS = 1e-3  # seconds that a polling wait adds to a message, see ``comm.Mpi``


class CostModel(Protocol):
    """Seconds of clients that are computed together."""

    def cost(self, sizes: Sequence[int], batch_size: int) -> float: ...


class UnitCosts(NamedTuple):
    """What clients of one type cost, in seconds."""

    train: CostModel  # training, upload, and the exact addition of the upload
    tune: CostModel  # tuning before an evaluation
    score: CostModel  # evaluation of test samples, in one batch
    add: float  # expanding another rank's upload and adding it to the sum


class Costs(NamedTuple):
    """What a run costs besides, in seconds unless a comment says otherwise."""

    units: Mapping[int, UnitCosts]  # by client type
    begin: float  # start of a round, on every rank
    close: float  # end of a round, on every rank, after the message: mean and server update
    vectors: float  # per round: the server's singular vectors, divided among the ranks
    mix: tuple[float, float]  # per round: for each client of the cohort, and for each pair
    log: float  # per round
    checkpoint: float  # of one checkpoint, without its bytes and the client files
    file: float  # of each client file
    byte: float  # of each byte of a checkpoint
    add_byte: float  # of adding up each byte of a message in memory
    resident: int  # peak memory of this process in bytes, with the data and one stack


class Machine(NamedTuple):
    """The cores and the network that the ranks use."""

    cores: float  # cores that compute at once; infinite: one for each rank
    bandwidth: float  # bytes/s of a message
    latency: float  # seconds of a message


class Seconds(NamedTuple):
    """Seconds of a round by stage. ``files`` is a mean over all rounds, of which only some write a
    checkpoint.
    """

    train: float
    exchange: float
    evaluate: float
    files: float
    busy_fraction: float  # mean training time of the workers over that of the slowest

    @property
    def round(self) -> float:
        return self.train + self.exchange + self.evaluate + self.files


def forecast(
    assembly: Assembly, costs: Costs, workers: Sequence[int], ranks: int, machine: Machine
) -> Seconds:
    """The seconds of a round of the first task. They are a mean over the first rounds; in each
    round the slowest rank counts.
    """
    federation, config = assembly.federation, assembly.config
    host = assign_groups(federation.placement.costs, workers)
    busy_workers = len({*host})  # the others sleep
    worker_slowdown = max(1.0, busy_workers * config.engine.threads / machine.cores)
    rank_slowdown = max(1.0, ranks * config.engine.threads / machine.cores)
    task_rounds = config.data.tasks.rounds if config.data.tasks else config.rounds
    rounds = 1 if config.participation == 1 else min(_ROUNDS, config.rounds, task_rounds)
    evaluated_fraction = 1 / config.evaluate.every
    train_seconds, busy_fractions, exchange_seconds, evaluate_seconds = [], [], [], []
    for round_ in range(rounds):
        cohort = federation.cohorts.sample(round_)
        loads = _training_loads(assembly, costs, cohort, host, workers, evaluated_fraction)
        train_seconds.append(costs.begin + max(loads))
        everybody = range(len(cohort.clients))
        evaluated_clients = cohort.members if federation.evaluate_cohort_only else everybody
        evaluate_seconds.append(
            max(_evaluation_loads(assembly, costs, evaluated_clients, host, workers))
        )
        busy_fractions.append(sum(loads) / (len(loads) * max(max(loads), 1e-12)))
        exchange_seconds.append(
            _exchange_seconds(
                federation, costs, cohort, ranks, len(workers), machine, rank_slowdown
            )
        )

    def mean(values):
        return float(np.mean(values))

    evaluate = mean(evaluate_seconds) * worker_slowdown * evaluated_fraction
    files = (
        costs.log + _checkpoint_seconds(federation, costs, host, workers) / config.checkpoint.every
    )
    return Seconds(
        mean(train_seconds) * worker_slowdown,
        mean(exchange_seconds),
        evaluate,
        files,
        mean(busy_fractions),
    )


def allreduce(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of an allreduce: 2 (R - 1) / R of the bytes pass through each rank (Thakur,
    Rabenseifner, Gropp 2005).
    """
    if ranks == 1:
        return 0.0
    transfer = 2 * (ranks - 1) / ranks * bytes_ / machine.bandwidth
    return transfer + 2 * math.ceil(math.log2(ranks)) * machine.latency + _POLL_SECONDS


def allgather(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds until every rank has all ``bytes_`` bytes."""
    if ranks == 1:
        return 0.0
    return (
        (ranks - 1) / ranks * bytes_ / machine.bandwidth
        + math.ceil(math.log2(ranks)) * machine.latency
        + _POLL_SECONDS
    )


def _training_loads(
    assembly: Assembly,
    costs: Costs,
    cohort: Cohort,
    host: Sequence[int],
    workers: Sequence[int],
    evaluated_fraction: float,
) -> list[float]:
    """Training seconds of each worker, including ``evaluated_fraction`` of an evaluation of the
    trained clients.
    """
    load, batch_size = dict.fromkeys(workers, 0.0), assembly.config.train.batch_size
    federation, clients = assembly.federation, cohort.clients
    for group, rank in zip(federation.placement.groups, host, strict=True):
        unit = costs.units[clients.type_of[group[0]]]
        members = [c for c in group if c in cohort.members]
        for stack in _stacks(federation, clients, members):
            load[rank] += unit.train.cost([clients.sizes[c] for c in stack], batch_size)
            load[rank] += evaluated_fraction * _score_seconds(assembly, unit, stack)
    return list(load.values())


def _evaluation_loads(
    assembly: Assembly,
    costs: Costs,
    evaluated_clients: Collection[int],
    host: Sequence[int],
    workers: Sequence[int],
) -> list[float]:
    """Seconds that each worker needs to evaluate its part of ``evaluated_clients``."""
    load, batch_size = dict.fromkeys(workers, 0.0), assembly.config.train.batch_size
    federation, clients = assembly.federation, assembly.federation.cohorts.clients(0)
    for group, rank in zip(federation.placement.groups, host, strict=True):
        unit = costs.units[clients.type_of[group[0]]]
        members = [c for c in group if c in evaluated_clients]
        for stack in _stacks(federation, clients, members):
            load[rank] += unit.tune.cost(
                [clients.sizes[c] for c in stack], batch_size
            ) + _score_seconds(assembly, unit, stack)
    return list(load.values())


def _score_seconds(assembly: Assembly, unit: UnitCosts, stack: Sequence[int]) -> float:
    tests = [len(assembly.sample_split.test[c]) for c in stack]
    return unit.score.cost(tests, max(tests))


def _stacks(federation: Federation, clients: Clients, members: Sequence[int]) -> list[list[int]]:
    """``members`` of a group in stacks that are computed at once."""
    if not members:
        return []
    stacks = federation.placement.split_into_stacks(members, clients)
    if clients.trainer.stacked:
        return [list(stack) for stack in stacks]
    return [[c] for stack in stacks for c in stack]


def _exchange_seconds(
    federation: Federation,
    costs: Costs,
    cohort: Cohort,
    ranks: int,
    workers: int,
    machine: Machine,
    slowdown: float,
) -> float:
    """Seconds between the end of the last training and the evaluation."""
    seconds, has_peers = costs.close * slowdown, ranks > 1
    seconds += costs.vectors * (slowdown / ranks if has_peers else 1.0)
    aggregator, clients = federation.aggregator, cohort.clients
    if aggregator.gathers and has_peers:
        upload_bytes = 4 * sum(clients[c].upload_layout.size for c in cohort.members)
        # on the server, which is assumed to host none of these clients
        add_seconds = sum(costs.units[clients.type_of[c]].add for c in cohort.members)
        seconds += allgather(upload_bytes, ranks, machine) + add_seconds * slowdown
    elif has_peers:
        message = round(aggregator.number_bytes * aggregator.terms.size)
        seconds += (
            allreduce(message, ranks, machine)
            + (ranks - 1) / ranks * message * costs.add_byte * slowdown
        )
    if mixing := aggregator.mixing:
        per_client, per_pair = costs.mix
        members = cohort.members
        seconds += (per_client * len(members) + per_pair * mixing.additions(members)) / (
            workers if len(mixing.workers) > 1 else 1
        )
        seconds += allgather(mixing.bytes_mpi(members, ranks), ranks, machine)
    return seconds


def _checkpoint_seconds(
    federation: Federation, costs: Costs, host: Sequence[int], workers: Sequence[int]
) -> float:
    """Seconds of a checkpoint. All workers write their clients at the same time, one file per
    client type; then rank 0 writes the rest.
    """
    personal_bytes, files = dict.fromkeys(workers, 0), set()
    clients = federation.clients
    for group, rank in zip(federation.placement.groups, host, strict=True):
        files |= {(rank, clients.type_of[c]) for c in group}
        personal_bytes[rank] += sum(nbytes(clients[c].initial.personal) for c in group)
    shared = nbytes(clients.types[0].initial.shared)
    return (
        costs.checkpoint
        + costs.file * len(files)
        + costs.byte * (max(personal_bytes.values()) + shared)
    )
