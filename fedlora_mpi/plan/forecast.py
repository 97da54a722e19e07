"""Compute how long a round takes from unit costs. This is arithmetic only; nothing is measured
here.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..core.scheduling import assign_groups
from ..core.tree import nbytes, numel
from ..federation.federation import Run
from ..run.assembly import Assembly

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
    run: Run,
    costs: Costs,
    chosen: frozenset[int],
    host: Sequence[int],
    workers: Sequence[int],
    evaluated_fraction: float,
) -> list[float]:
    """Training seconds of each worker, including ``evaluated_fraction`` of an evaluation of the
    trained clients.
    """
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
    """Seconds that each worker needs to evaluate its part of ``evaluated_clients``."""
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
    """The clients in stacks that are computed at once."""
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
    """Seconds between the end of the last training and the evaluation."""
    seconds, has_peers = costs.close * slowdown, ranks > 1
    seconds += costs.vectors * (slowdown / ranks if has_peers else 1.0)
    if run.gather_uploads and has_peers:
        upload_bytes = 4 * sum(numel(run.kinds[run.kind_of[c]].untrained_upload) for c in chosen)
        # on the server, which is assumed to host none of these clients
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
    """Seconds of a checkpoint. All workers write their clients at the same time, one file per
    client type; then rank 0 writes the rest.
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
