"""What a config would cost, before anything is trained.

Sizes follow from the model and the partition. Time and memory follow from unit costs that
``unit_costs`` measures: a stack of each kind of clients plays a few batches, and ``forecast`` adds
up what each rank of the real placement would do.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..aggregation.flat_layout import Layout, bytes_of, joint
from ..algorithm import Cohort, Vars
from ..config import Config
from ..core.scheduling import assign
from ..core.tree import Tree, nbytes, numel, tmap
from ..core.units import duration, size
from ..federation.federation import Kind, Run
from ..mpi.comm import Solo
from ..run.assembly import Built, build, hosts
from ..run.fingerprint import kept
from .counted import fits
from .devices import BANDWIDTH, CONTEXT, LATENCY, OF_BANDWIDTH, OF_PEAK, device
from .forecast import Costs, Machine, Seconds, forecast
from .roles import decomposition, roles
from .unit_costs import measured

_COLUMNS = 20  # of the log, about
# bytes of a log and of a checkpoint's files beside the numbers in them
_LOG, _FILES = 120_000, 60_000


class Estimate(NamedTuple):
    """What a config would cost; ``plan`` shows it."""

    built: Built
    seconds: Seconds  # of a round of the first task
    memory: float  # bytes of the worker with most personal state
    clients: int  # of that worker
    client: float  # bytes of a GPU's memory for each client of a stack; 0 without --gpus
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
    """The costs of ``config`` on ``ranks`` ranks: of this machine, or elsewhere with a GPU named
    ``gpus`` each (``none``: with a core each).

    bandwidth: bytes/s, latency: seconds of a message. Raises ValueError for what cannot be.
    """
    if ranks < 1:
        raise ValueError(f"--ranks = {ranks}: must be an integer of at least 1")
    for name, value in (("bandwidth", bandwidth), ("latency", latency)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} = {value:g}: must be positive")
    gpu, asked = device(gpus) if gpus else None, config.engine.path
    workers = hosts(config, ranks)
    if not workers:
        raise ValueError(f"--ranks = {ranks}: server_hosts_clients = false needs at least 2")
    if gpus:
        path = "stack" if gpu and config.engine.path != "loop" else config.engine.path
        config = replace(config, engine=replace(config.engine, device="cpu", path=path))
    built = build(config, source, Solo(), asked)
    cores = os.cpu_count() or 1
    others = 0 if gpus else min(len(workers), cores // config.engine.threads) - 1
    costs, client = measured(built, gpu, max(0, others))
    cores = math.inf if gpus else cores
    speed, delay = (BANDWIDTH, LATENCY) if gpus else (1 / costs.add_byte, 0.0)
    machine = Machine(cores, bandwidth or speed, latency or delay)
    run = built.run
    clients = {rank: [] for rank in workers}
    for group, rank in zip(run.groups, assign(run.costs, list(workers)), strict=True):
        clients[rank] += group
    own = {
        rank: sum(nbytes(run.kinds[run.kind_of[c]].first.personal) for c in at)
        for rank, at in clients.items()
    }
    most = max(own, key=own.get)
    held = own[most] * (config.participation if config.engine.personal == "disk" else 1)
    # the rows of a ward; changed ones as they were in two rounds, going and coming
    if config.faults.tolerate:
        held += own[most] * (1 + 4 * config.participation)
    memory = costs.resident + held + (16 if config.reduce == "exact" else 4) * run.upload.size
    seconds = forecast(built, costs, list(workers), ranks, machine)
    return Estimate(built, seconds, memory, len(clients[most]), client, machine, costs)


def plan(
    config: Config,
    source: str,
    ranks: int,
    gpus: str | None = None,
    bandwidth: float | None = None,
    latency: float | None = None,
) -> str:
    """``estimate`` as lines of text."""
    found = estimate(config, source, ranks, gpus, bandwidth, latency)
    where = f"this machine ({os.cpu_count()} cores)"
    if gpus:
        where = (
            "cores like these, one each"
            if gpus == "none"
            else f"a machine with {gpus}, one for each worker"
        )
    lines = [f"{source} on {ranks} rank{'s' * (ranks > 1)} of {where}"]
    costs = _costs(found, len(hosts(config, ranks)), gpus)
    for title, text in (
        *_sizes(found.built, ranks),
        *_privacy(found.built),
        *costs,
        *_origins(found, gpus, bandwidth, latency),
    ):
        lines.append(f"  {title:<10} {text}")
    return "\n".join(lines)


def storage(built: Built) -> int:
    """Bytes that the run folder comes to: the kept checkpoints and one in the making, each with a
    log, and the log.
    """
    config, run, split = built.config, built.run, built.split
    first = run.kinds[0].first.shared
    personal = sum(nbytes(run.kinds[kind].first.personal) for kind in run.kind_of)
    state = (
        _FILES + personal + nbytes(first) + nbytes(run.algorithm.server(run.trainer.model, first))
    )
    samples = sum(map(len, (*split.train, *split.test)))
    log = _LOG + 8 * (samples + config.rounds * (_COLUMNS + 2 * len(run.weight_N)))
    log += len(json.dumps(kept(built.inventory))) if built.inventory else 0
    copies = config.checkpoint.keep + 1
    return (
        copies * state + (copies + 1) * log + (personal if config.engine.personal == "disk" else 0)
    )


def _sizes(built: Built, ranks: int) -> list[tuple[str, str]]:
    """Parameters and bytes."""
    config, run = built.config, built.run
    first, clients, cohort = run.kinds[0].first, len(run.weight_N), _cohort(run)
    second = _second(run)
    traffic = [_traffic(run, kind, second) for kind in run.kinds]
    up, down = zip(*(traffic[kind] for kind in run.kind_of), strict=True)
    message, how = run.unit * run.upload.size, "an allreduce"
    if run.gathers:
        width = joint([layout.dtype for layout in run.layouts]).itemsize
        message, how = (
            width * sum(run.layouts[kind].size for kind in run.kind_of) * cohort // clients,
            "a gather",
        )
    own = [numel(run.kinds[kind].first.personal) for kind in run.kind_of]
    total, comma = (
        sum(nbytes(run.kinds[kind].first.personal) for kind in run.kind_of),
        "{:,}".format,
    )
    return [
        *(
            line
            for n in sorted({kind.network for kind in run.kinds})
            for line in _network(run, n, config.model.mix[n].name)
        ),
        (
            "shared",
            f"{numel(first.shared):,} numbers; {_range(up, size)} up, {_range(down, size)} down "
            "per client and round",
        ),
        ("personal", f"{_range(own, comma)} numbers per client; {size(total)} in a checkpoint"),
        (
            "round",
            f"{cohort} of {clients} clients: {size(sum(up) * cohort // clients)} up, "
            f"{size(sum(down) * cohort // clients)} down; "
            + (f"{how} of {size(message)} per rank" if ranks > 1 else "no message, one rank"),
        ),
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
    said = (
        f"epsilon {run.epsilon(rounds):.3g} at delta {block.delta:g} after {rounds} rounds, for "
        f"{relation}"
    )
    noise = block.deviation / run.total(run.chosen(0))
    return [("privacy", f"{said}; noise of deviation {noise:.2g} on each number of the mean")]


def _traffic(run: Run, kind: Kind, second: Tree) -> tuple[int, int]:
    """The most bytes that such a client sends and receives in a round; ``second``: what ``_second``
    says.
    """

    def ones(tree):
        return tmap(torch.ones_like, tree)  # of a method that sends by class: all classes

    full, first = Vars(*map(ones, kind.arrived[:2])), kind.first.shared
    sent = max(int(kind.algorithm.sent(v, v)) for v in (kind.arrived, full))
    up = bytes_of(sent, [Layout.of(kind.upload)])
    down = max(kind.received(shared) for shared in (first, ones(first), second))
    return (up + run.mixing.bytes_up, down + run.mixing.bytes_down) if run.mixing else (up, down)


def _second(run: Run) -> Tree:
    """The shared variables before round 2 if all of a cohort, clients of equal weight, came back
    untrained.
    """
    shared, kinds = (
        run.kinds[0].first.shared,
        [run.kind_of[client] for client in run.chosen(0) or (0,)],
    )
    terms = {kind: run.kinds[kind].term for kind in set(kinds)}
    mean = tmap(lambda *leaves: sum(leaves) / len(leaves), *(terms[kind] for kind in kinds))
    cohort = Cohort(len(kinds) / len(run.weight_N), len(kinds))
    return run.algorithm.serve(
        run.algorithm.server(run.trainer.model, shared), shared, mean, cohort
    )[1]


def _range(numbers: Sequence[int], said: Callable[[int], str]) -> str:
    """From the smallest to the largest, or the one that all are."""
    least, most = min(numbers), max(numbers)
    return said(most) if least == most else f"{said(least)} to {said(most)}"


def _network(run: Run, number: int, name: str) -> list[tuple[str, str]]:
    """What is known of a network, and what its parts are to the method."""
    having = [k for k, kind in enumerate(run.kinds) if kind.network == number]
    model = run.kinds[having[0]].trainer.model
    return [
        ("model", _model(run, number, name)),
        *roles(model),
        *decomposition(model, run.algorithm),
    ]


def _model(run: Run, number: int, name: str) -> str:
    """The size of a network."""
    having = [k for k, kind in enumerate(run.kinds) if kind.network == number]
    model, clients = run.kinds[having[0]].trainer.model, sum(kind in having for kind in run.kind_of)
    statistics = sum(v.numel() for n, v in model.initial.items() if model.role(n) == "stats")
    frozen = numel(model.values) - numel(model.initial)
    return (
        f"{name}: {numel(model.initial) - statistics:,} parameters, "
        + (f"{frozen:,} frozen ones, " if frozen else "")
        + f"{statistics:,} running statistics, "
        f"{model.flops / 1e6:.1f} MFLOP forward per sample"
        + (f"; {clients} clients" if clients < len(run.kind_of) else "")
    )


def _costs(found: Estimate, workers: int, gpus: str | None) -> list[tuple[str, str]]:
    """Memory and time."""
    config, run, seconds = found.built.config, found.built.run, found.seconds
    named = ("train", "exchange", "evaluate", "files")
    stages = ", ".join(f"{name} {duration(getattr(seconds, name))}" for name in named)
    lines = [
        (
            "engine",
            f"{config.engine.path} on "
            f"{gpus if gpus not in (None, 'none') else config.engine.device}, {len(run.groups)} "
            f"groups of up to {max(map(len, run.groups))}, {workers} workers, {seconds.busy:.0%} "
            "balanced",
        ),
        (
            "memory",
            f"{size(found.memory)} for the worker with most personal state ({found.clients} "
            "clients)",
        ),
    ]
    if found.client:
        gpu, together = device(gpus), config.engine.group_size
        own, ranks, clients = fits(gpu, run.trainer.feed.nbytes, found.client, together)
        lines.append(
            (
                "gpu",
                f"{size(own)} of {size(gpu.memory)} for a worker: {ranks} fit on one; "
                f"or one with stacks of {clients:,} clients, where it has {together}",
            )
        )
    return lines + [
        (
            "disk",
            f"{size(storage(found.built))} for {config.checkpoint.keep} checkpoints, one in the "
            "making, and the log",
        ),
        (
            "time",
            f"{duration(seconds.round)} per round, {duration(seconds.round * config.rounds)} for "
            f"{config.rounds} rounds",
        ),
        ("of it", f"{stages} a round"),
    ]


def _origins(
    found: Estimate, gpus: str | None, bandwidth: float | None, latency: float | None
) -> list[tuple[str, str]]:
    """Which numbers were measured here, given, or assumed."""
    machine, assumed = found.machine, []
    given = [
        f"{name} {value:g}"
        for name, value in (("bandwidth", bandwidth), ("latency", latency))
        if value
    ]
    here = "computing, adding up and writing here, on one core"
    if found.client:
        here = (
            "starting operations, adding up and writing here, on one core; operations, FLOPs and "
            "bytes counted"
        )
        assumed.append(
            f"{OF_PEAK:.0%} of the {gpus}'s FLOP/s and {OF_BANDWIDTH:.0%} of its memory bandwidth "
            f"are reached; {size(CONTEXT)} for CUDA"
        )
    if gpus and not bandwidth:
        assumed.append(f"{size(machine.bandwidth)}/s between ranks (--bandwidth)")
    if gpus and not latency:
        assumed.append(f"{machine.latency * 1e6:.2g} us for a message (--latency)")
    lines = [("measured", here)]
    lines += [("given", ", ".join(given))] if given else []
    return lines + ([("assumed", "; ".join(assumed))] if assumed else [])
