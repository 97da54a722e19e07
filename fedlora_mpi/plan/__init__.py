"""Estimate what a config costs before anything is trained.

Sizes follow from the model and the partition. Time and memory follow from unit costs, which
``unit_costs`` measures by running a few batches with one stack of each client type. ``forecast``
then adds up what each rank of the real placement would compute.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch

from ..aggregation.flat_layout import estimate_nbytes, joint_dtype
from ..aggregation.svd import right_vectors
from ..aggregation.topology import topology_name
from ..algorithm import Variables
from ..config import Config
from ..config.experiment import Network
from ..core.scheduling import assign_groups
from ..core.tree import nbytes, numel, tmap
from ..core.units import format_bytes, format_seconds
from ..data.feed import Feed
from ..experiment.assembly import Assembly, build
from ..experiment.engine_choice import worker_ranks
from ..experiment.fingerprint import recorded_inventory
from ..federation.clients import ClientType
from ..federation.federation import Federation, State
from ..models.network import Model
from ..mpi.comm import Solo
from .counted import gpu_capacity
from .devices import BANDWIDTH, BANDWIDTH_SHARE, CONTEXT_BYTES, LATENCY, PEAK_SHARE, find_device
from .forecast import Costs, Machine, Seconds, forecast
from .roles import head_line, leaf_lines
from .scaling import scaling_text
from .unit_costs import measure_costs, untrained_aggregate

_COLUMNS = 20  # approximate number of columns of the log
_LARGEST_BYTES = 2e9  # networks of more bytes are not built for a plan with --gpus
# bytes of a log, and of a checkpoint's files, without the numbers in them
_LOG_BYTES, _CHECKPOINT_BYTES = 120_000, 60_000


class Estimate(NamedTuple):
    """The costs of a config, as ``plan`` reports them."""

    assembly: Assembly
    seconds: Seconds  # of a round of the first task
    worker_bytes: float  # bytes of the worker with most personal state
    worker_clients: int  # clients of that worker
    client_bytes: float  # bytes of GPU memory per client of a stack; 0 without --gpus
    row_bytes: float  # bytes of its personal leaves that a GPU keeps
    machine: Machine
    costs: Costs


def estimate(
    config: Config,
    source: str,
    ranks: int,
    gpus: str | None = None,
    bandwidth: float | None = None,
    latency: float | None = None,
) -> Estimate:
    """Return the costs of ``config`` on ``ranks`` ranks.

    The ranks are on this machine or, with ``gpus``, on another one: each rank has one GPU of that
    name (``none``: one CPU core).

    bandwidth: bytes/s, latency: seconds of a message. Raises ValueError for options that are not
    allowed.
    """
    if ranks < 1:
        raise ValueError(f"--ranks = {ranks}: must be an integer of at least 1")
    for name, value in (("bandwidth", bandwidth), ("latency", latency)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} = {value:g}: must be positive")
    gpu, requested_path = find_device(gpus) if gpus else None, config.engine.path
    workers = worker_ranks(config, ranks)
    if not workers:
        raise ValueError(f"--ranks = {ranks}: server_hosts_clients = false needs at least 2")
    if gpus:
        one_by_one = config.engine.path in ("loop", "streams")
        stacks = gpu and not one_by_one and not config.engine.gradient_checkpointing
        path = "stack" if stacks else config.engine.path
        config = replace(config, engine=replace(config.engine, device="cpu", path=path))
    values_up_to = _LARGEST_BYTES if gpu else math.inf
    assembly = build(config, source, Solo(), requested_path, values_up_to)
    cores = os.cpu_count() or 1
    other_workers = 0 if gpus else min(len(workers), cores // config.engine.threads) - 1
    costs, client_bytes = measure_costs(assembly, gpu, max(0, other_workers))
    default_bandwidth, default_latency = (BANDWIDTH, LATENCY) if gpus else (1 / costs.add_byte, 0.0)
    machine = Machine(
        math.inf if gpus else cores, bandwidth or default_bandwidth, latency or default_latency
    )
    federation, placement = assembly.federation, assembly.federation.placement
    clients: dict[int, list[int]] = {rank: [] for rank in workers}
    hosts = assign_groups(placement.costs, list(workers))
    for group, rank in zip(placement.groups, hosts, strict=True):
        clients[rank] += group
    personal_bytes = {
        rank: sum(nbytes(federation.clients[c].initial.personal) for c in rank_clients)
        for rank, rank_clients in clients.items()
    }
    fullest_rank = max(personal_bytes, key=personal_bytes.__getitem__)
    row_bytes = personal_bytes[fullest_rank]
    on_gpu = gpu is not None and config.engine.personal == "device"
    memory = costs.resident + _host_bytes(assembly, row_bytes, on_gpu)
    seconds = forecast(assembly, costs, list(workers), ranks, machine)
    return Estimate(
        assembly,
        seconds,
        memory,
        len(clients[fullest_rank]),
        client_bytes,
        row_bytes * on_gpu,
        machine,
        costs,
    )


def _host_bytes(assembly: Assembly, row_bytes: float, on_gpu: bool) -> float:
    """Bytes of memory of a worker with ``row_bytes`` of personal leaves, beside what was measured.

    on_gpu: whether these leaves are on a GPU.
    """
    config, federation = assembly.config, assembly.federation
    held_share = {"disk": config.participation, "device": float(not on_gpu)}
    held_bytes = row_bytes * held_share.get(config.engine.personal, 1.0)
    # replicas of another rank's rows; changed rows: former values of two rounds, one outgoing and
    # one incoming message
    if config.faults.tolerate:
        held_bytes += row_bytes * (1 + 4 * config.participation)
    if federation.clients.trainer.model.is_without_values:
        held_bytes += sum(model.read_nbytes for model in _networks(federation))
    number_bytes = 16 if config.reduce == "exact" else 4
    return held_bytes + number_bytes * federation.aggregator.terms.size


def plan(
    config: Config,
    source: str,
    ranks: int,
    gpus: str | None = None,
    bandwidth: float | None = None,
    latency: float | None = None,
) -> str:
    """Return ``estimate`` as lines of text."""
    estimated = estimate(config, source, ranks, gpus, bandwidth, latency)
    machine_text = f"this machine ({os.cpu_count()} cores)"
    if gpus:
        machine_text = (
            "cores like these, one each"
            if gpus == "none"
            else f"a machine with {gpus}, one for each worker"
        )
    rank_text = "1 rank" if ranks == 1 else f"{ranks} ranks"
    lines = [f"{source} on {rank_text} of {machine_text}"]
    costs = _cost_lines(estimated, len(worker_ranks(config, ranks)), gpus)
    scaling = scaling_text(estimated.assembly, estimated.costs, ranks, estimated.machine)
    for title, text in (
        *_size_lines(estimated.assembly, ranks),
        *_topology_lines(estimated.assembly),
        *_privacy_lines(estimated.assembly),
        *costs,
        *([("scaling", scaling)] if scaling else []),
        *_origin_lines(estimated, gpus, bandwidth, latency),
    ):
        lines.append(f"  {title:<10} {text}")
    return "\n".join(lines)


def storage_bytes(assembly: Assembly) -> int:
    """Bytes of the run folder: the log, the kept checkpoints and one that is being written. Each
    checkpoint has a copy of the log.
    """
    config, federation, split = assembly.config, assembly.federation, assembly.split
    clients = federation.clients
    initial_shared = clients.types[0].initial.shared
    personal = sum(nbytes(clients[c].initial.personal) for c in range(len(clients)))
    state = (
        _CHECKPOINT_BYTES
        + personal
        + nbytes(initial_shared)
        + nbytes(federation.algorithm.server(clients.trainer.model, initial_shared))
    )
    samples = sum(map(len, (*split.train, *split.test)))
    log = _LOG_BYTES + 8 * (samples + config.rounds * (_COLUMNS + 2 * len(clients)))
    log += len(json.dumps(recorded_inventory(assembly.inventory))) if assembly.inventory else 0
    copies = config.checkpoint.keep + 1
    return (
        copies * state + (copies + 1) * log + (personal if config.engine.personal == "disk" else 0)
    )


def _size_lines(assembly: Assembly, ranks: int) -> list[tuple[str, str]]:
    """Lines on the networks, on shared and personal numbers, and on the traffic of a round."""
    config, federation, clients = assembly.config, assembly.federation, assembly.federation.clients
    initial, cohort = clients.types[0].initial, _cohort_size(federation)
    second_state = _second_state(federation)
    traffic = [_client_traffic(federation, t, second_state) for t in clients.types]
    everyone = frozenset(range(len(clients)))
    up, down = zip(*(_add_mix(federation, c, everyone, traffic) for c in everyone), strict=True)
    round_bytes = [sum(side) * cohort // len(clients) for side in (up, down)]
    if federation.matrix:  # who has which neighbours in the cohort of round 1
        members = federation.cohorts.sample(0).members
        pairs = [_add_mix(federation, client, members, traffic) for client in members]
        round_bytes = [sum(side) for side in zip(*pairs, strict=True)]
    aggregator = federation.aggregator
    message, message_kind = round(aggregator.number_bytes * aggregator.terms.size), "an allreduce"
    if aggregator.gathers:
        layouts = [clients[c].upload_layout for c in range(len(clients))]
        width = joint_dtype([layout.dtype for layout in layouts]).itemsize
        message = width * sum(layout.size for layout in layouts) * cohort // len(clients)
        message_kind = "a gather"
    personal = [clients[c].initial.personal for c in range(len(clients))]
    personal_numel, total, with_commas = (
        [*map(numel, personal)],
        sum(map(nbytes, personal)),
        "{:,}".format,
    )
    return [
        *(
            line
            for n in sorted({t.network for t in clients.types})
            for line in _network_lines(federation, n, config.model.mix[n])
        ),
        (
            "shared",
            f"{numel(initial.shared):,} numbers; {_range_text(up, format_bytes)} up, "
            f"{_range_text(down, format_bytes)} down per client and round",
        ),
        (
            "personal",
            f"{_range_text(personal_numel, with_commas)} numbers per client; {format_bytes(total)} "
            "in a checkpoint",
        ),
        (
            "round",
            f"{cohort} of {len(clients)} clients: {format_bytes(round_bytes[0])} up, "
            f"{format_bytes(round_bytes[1])} down; "
            + (
                f"{message_kind} of {format_bytes(message)} per rank"
                if ranks > 1
                else "no message, one rank"
            ),
        ),
    ]


def _cohort_size(federation: Federation) -> int:
    """How many clients a round has; where that is random, about."""
    cohort = federation.cohorts.sample(0)
    if cohort.expected_size is None:
        return len(cohort.members)
    return max(1, round(cohort.expected_size))


def _topology_lines(assembly: Assembly) -> list[tuple[str, str]]:
    """The graph over which clients exchange; none without it."""
    matrix, topology = assembly.federation.matrix, assembly.config.topology
    if not (matrix and topology):
        return []
    degrees = [len(neighbours) for neighbours in matrix.neighbours]
    return [
        (
            "topology",
            f"{topology_name(topology)}: {sum(degrees) // 2:,} edges, "
            f"{_range_text(degrees, str)} neighbours per client, spectral gap "
            f"{matrix.spectral_gap:.3g}",
        )
    ]


def _privacy_lines(assembly: Assembly) -> list[tuple[str, str]]:
    """The differential privacy that all rounds together cost; none without it."""
    cohorts = assembly.federation.cohorts
    block, rounds = assembly.config.privacy, assembly.config.rounds
    if not block.is_differential:
        return []
    relation = (
        "one client more or less" if block.samples_poisson else "another client in the place of one"
    )
    epsilon_text = (
        f"epsilon {cohorts.epsilon(rounds):.3g} at delta {block.delta:g} after {rounds} rounds, "
        f"for {relation}"
    )
    noise = block.noise_std / cohorts.sample(0).weight
    return [
        ("privacy", f"{epsilon_text}; noise of deviation {noise:.2g} on each number of the mean")
    ]


def _client_traffic(
    federation: Federation, client_type: ClientType, second_state: State
) -> tuple[int, int]:
    """The most bytes that such a client sends and receives in a round, without its mix.

    second_state: see ``_second_state``.
    """

    def ones_like(tree):
        return tmap(torch.ones_like, tree)  # of a method that sends by class: all classes

    initial, local_initial = client_type.initial, client_type.local_initial
    all_ones = Variables(*map(ones_like, local_initial[:2]))
    numels = [client_type.algorithm.upload(v, v, 0).sent_numel for v in (local_initial, all_ones)]
    up = estimate_nbytes(max(numels), [client_type.upload_layout])
    server = federation.algorithm.server(federation.clients.trainer.model, initial.shared)
    down = max(
        client_type.download_nbytes(server, initial.shared, 0),
        client_type.download_nbytes(ones_like(server), ones_like(initial.shared), 0),
        client_type.download_nbytes(second_state.server, second_state.shared, 1),
    )
    return up, down


def _add_mix(
    federation: Federation, client: int, members: Set[int], traffic: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The bytes that a client of the cohort ``members`` sends and receives in a round.

    traffic: these without its mix, by the number of its type.
    """
    up, down = traffic[federation.clients.type_of[client]]
    mixing = federation.aggregator.mixing
    mix_up, mix_down = mixing.bytes_of(client, members) if mixing else (0, 0)
    return up + mix_up, down + mix_down


def _second_state(federation: Federation) -> State:
    """The state before round 2 if all of a cohort, clients of equal weight, came back untrained."""
    shared = federation.clients.types[0].initial.shared
    server = federation.algorithm.server(federation.clients.trainer.model, shared)
    update = federation.algorithm.server_update(
        server, shared, untrained_aggregate(federation), partial(right_vectors, Solo())
    )
    return State(1, update.server, update.shared, {})


def _range_text(numbers: Sequence[int], format_number: Callable[[int], str]) -> str:
    """The smallest and the largest number as text, or one number if all are equal."""
    least, most = min(numbers), max(numbers)
    return (
        format_number(most) if least == most else f"{format_number(least)} to {format_number(most)}"
    )


def _network_lines(federation: Federation, number: int, network: Network) -> list[tuple[str, str]]:
    """What is known of a network, and what its parts are to the method."""
    clients, full = federation.clients, getattr(federation.algorithm, "full", ())
    model = next(t.trainer.model for t in clients.types if t.network == number)
    return [
        ("model", _model_text(federation, number, network.name)),
        head_line(model, network.head),
        *leaf_lines(model, clients.low_rank(number), full),
    ]


def _model_text(federation: Federation, number: int, name: str) -> str:
    """The size of a network."""
    everybody = [federation.clients[c] for c in range(len(federation.clients))]
    with_network = [t for t in everybody if t.network == number]
    model = with_network[0].trainer.model
    statistics = sum(v.numel() for n, v in model.initial.items() if model.role(n) == "stats")
    frozen = numel(model.all_values) - numel(model.initial)
    return (
        f"{name}: {numel(model.initial) - statistics:,} parameters, "
        + (f"{frozen:,} frozen ones, " if frozen else "")
        + f"{statistics:,} running statistics, "
        f"{model.flops / 1e6:.1f} MFLOP forward per sample"
        + (f"; {len(with_network)} clients" if len(with_network) < len(everybody) else "")
    )


def _networks(federation: Federation) -> Collection[Model]:
    """All networks of a worker, each in memory once for all clients."""
    return {t.network: t.trainer.model for t in federation.clients.types}.values()


def _cost_lines(estimated: Estimate, workers: int, gpus: str | None) -> list[tuple[str, str]]:
    """Lines on the engine, memory, disk and time."""
    config, seconds = estimated.assembly.config, estimated.seconds
    federation = estimated.assembly.federation
    groups = federation.placement.groups
    stage_names = ("train", "exchange", "evaluate", "files")
    stages = ", ".join(f"{name} {format_seconds(getattr(seconds, name))}" for name in stage_names)
    lines = [
        (
            "engine",
            f"{config.engine.path} on "
            f"{gpus if gpus not in (None, 'none') else config.engine.device}, {len(groups)} "
            f"group{'s' * (len(groups) > 1)} of up to {max(map(len, groups))}, {workers} "
            f"worker{'s' * (workers > 1)}, "
            f"{seconds.busy_fraction:.0%} balanced",
        ),
        (
            "memory",
            f"{format_bytes(estimated.worker_bytes)} for the worker with most personal state "
            f"({estimated.worker_clients} clients)",
        ),
    ]
    if estimated.client_bytes:
        assert gpus is not None
        gpu, group_size = find_device(gpus), config.engine.group_size
        assert gpu is not None and isinstance(group_size, int)
        worker_bytes, ranks, clients = gpu_capacity(
            gpu,
            cast(Feed, federation.clients.trainer.feed).nbytes
            + sum(model.nbytes for model in _networks(federation))
            + estimated.row_bytes,
            estimated.client_bytes,
            group_size,
        )
        text = (
            f"{format_bytes(worker_bytes)} of {format_bytes(gpu.memory)} for a worker: {ranks} fit "
            "on one"
        )
        if config.engine.path != "loop":
            text += f"; or one that trains {clients:,} clients at once, not {group_size}"
        lines.append(("gpu", text))
    return lines + [
        (
            "disk",
            f"{format_bytes(storage_bytes(estimated.assembly))} for {config.checkpoint.keep} "
            "checkpoints, one in the making, and the log",
        ),
        (
            "time",
            f"{format_seconds(seconds.round)} per round, "
            f"{format_seconds(seconds.round * config.rounds)} for {config.rounds} rounds",
        ),
        ("of it", f"{stages} a round"),
    ]


def _origin_lines(
    estimated: Estimate, gpus: str | None, bandwidth: float | None, latency: float | None
) -> list[tuple[str, str]]:
    """Lines that say which numbers were measured here, which were given and which are assumed."""
    machine, assumed = estimated.machine, []
    options = [
        f"{name} {value:g}"
        for name, value in (("bandwidth", bandwidth), ("latency", latency))
        if value
    ]
    measured_here = "computing, adding up and writing here, on one core"
    if estimated.client_bytes:
        measured_here = (
            "starting operations, adding up and writing here, on one core; operations, FLOPs and "
            "bytes counted"
        )
        model = estimated.assembly.federation.clients.trainer.model
        measured_here += " by shapes, no weights read" if model.is_without_values else ""
        assumed.append(
            f"{PEAK_SHARE:.0%} of the {gpus}'s FLOP/s and {BANDWIDTH_SHARE:.0%} of its memory "
            f"bandwidth are reached; {format_bytes(CONTEXT_BYTES)} for CUDA"
        )
    if gpus and not bandwidth:
        assumed.append(f"{format_bytes(machine.bandwidth)}/s between ranks (--bandwidth)")
    if gpus and not latency:
        assumed.append(f"{machine.latency * 1e6:.2g} us for a message (--latency)")
    lines = [("measured", measured_here)]
    lines += [("given", ", ".join(options))] if options else []
    return lines + ([("assumed", "; ".join(assumed))] if assumed else [])
