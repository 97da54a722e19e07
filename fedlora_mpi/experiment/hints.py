"""What would make a run faster on this node, what its method leaves out, and what is doubtful."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

from .. import config as configs
from ..algorithm import Algorithm, LocalTraining, misspelt_hooks, phases_of
from ..components.lowrank import join_first, skipped_weights
from ..engine.half import multiplies_bfloat16
from ..models.network import Model
from ..mpi.launch import find_mpirun
from .assembly import Assembly
from .engine_choice import worker_ranks

# FLOP of a forward pass over one batch above which products take most of a step's time;
# measured: benchmarks/throughput.py
_BFLOAT16_FLOP = 1e8


def run_hints(assembly: Assembly) -> list[str]:
    """What would make this run faster on this node, for the user to decide, and what its low-rank
    parts leave out.
    """
    comm, engine = assembly.federation.comm, assembly.config.engine
    placement, lines = assembly.federation.placement, []
    workers = len(set(placement.rank_of_group))
    if workers < (available_workers := len(worker_ranks(assembly.config, comm.size))):
        lines.append(
            f"{len(placement.groups)} groups of clients keep {workers} of {available_workers} "
            "workers busy; a smaller engine.group_size gives work to more (and changes rounding)"
        )
    local_workers = comm.local_size - (available_workers < comm.size)
    cores, used_cores = os.cpu_count() or 1, local_workers * engine.threads
    if engine.device == "cpu" and used_cores > cores:
        lines.append(
            f"{local_workers} workers with {engine.threads} thread(s) share {cores} cores; start "
            "fewer ranks"
        )
    elif (
        engine.device == "cpu"
        and used_cores <= cores // 2
        and available_workers < len(placement.groups)
        and find_mpirun()
    ):
        lines.append(
            f"{used_cores} of {cores} cores are busy; --ranks {cores // engine.threads + 1} "
            "would use them all"
        )
    if engine.device == "cpu" and engine.precision == "float32" and multiplies_bfloat16():
        flops = max(t.trainer.model.flops for t in assembly.federation.clients.types)
        if flops * assembly.config.train.batch_size > _BFLOAT16_FLOP:
            lines.append(
                "this CPU multiplies bfloat16: engine.precision=bf16 may train faster (other "
                "numbers; weights stay float32)"
            )
    is_quantized = any(network.quantization for network in assembly.config.model.mix)
    if is_quantized and getattr(assembly.config.algorithm, "merge", False):
        lines.append(
            "model.quantization: algorithm.merge=false holds adapted Linears in 4 bits alone; true "
            "forms each of them for every client"
        )
    return lines + _decomposition_hints(assembly)


def _decomposition_hints(assembly: Assembly) -> list[str]:
    """Which weights have no low-rank part, where the config asks for one in all."""
    lines: list[str] = []
    clients, algorithm = assembly.federation.clients, assembly.federation.algorithm
    full_roles = getattr(algorithm, "full", ())
    if "*" not in getattr(algorithm, "layers", ()):
        return lines
    for network in sorted({t.network for t in clients.types}):
        types = [t for t in clients.types if t.network == network]
        model, low_rank = types[0].trainer.model, clients.low_rank(network)
        full_weights = [
            f"{name} ({why})"
            for name, why in skipped_weights(model, low_rank, full_roles).items()
            if model.role(name) not in full_roles
        ]
        if low_rank and full_weights:
            lines.append(
                f"{configs.algorithm_name(algorithm)} decomposes {len(low_rank)} of "
                f"{len(low_rank) + len(full_weights)} weights; not decomposed: "
                f"{join_first(full_weights)}; 'fedlora-mpi plan' lists them"
            )
    return lines


_ROUNDS = 4  # rounds whose phases are looked at: some methods alternate between rounds


def training_hints(assembly: Assembly) -> list[str]:
    """What clients never train, a line for each network and rank, and what settings and the method
    doubt.
    """
    clients, lines = assembly.federation.clients, setting_doubts(assembly.config)
    for client_type in clients.types:
        model, train = client_type.trainer.model, client_type.trainer.settings
        lines += method_doubts(assembly.federation.algorithm, model, train)
        shared = client_type.local_initial.shared
        lines += untrained_parts(client_type.algorithm, model, train, shared)
    return list(dict.fromkeys(lines))


def setting_doubts(config: configs.Config) -> list[str]:
    """A line for each key of the clients in the files that the partition does not use."""
    kind, source = configs.partition_kind(config.data.partition), config.data.source
    keys = {"table": source.table.client, "language": source.language.client}
    return [
        f"data.{block}.client = {key}: is not used, as data.partition.kind is {kind}; given takes "
        "the clients of the files"
        for block, key in keys.items()
        if key is not None and kind != "given"
    ]


def method_doubts(method: Algorithm, model: Model, train: LocalTraining) -> list[str]:
    """A line for each warning of the method's ``check``, and for each hook that is misspelt."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.check(model, train)
    lines = [*misspelt_hooks(type(method)), *(str(warning.message) for warning in caught)]
    return [f"{configs.algorithm_name(method)}: {line}" for line in lines]


def untrained_parts(
    method: Algorithm, model: Model, train: LocalTraining, shared: Iterable[str]
) -> list[str]:
    """A line if a phase of local training has no epoch in any round, or if no phase trains some of
    the network's parameters among the leaves ``shared``; it names the keys that count epochs.
    """
    rounds = [phases_of(method.local(model, train, round_)) for round_ in range(_ROUNDS)]
    most = max(map(len, rounds))
    idle = [
        str(number + 1)
        for number in range(most)
        if not any(phases[number].epochs for phases in rounds if number < len(phases))
    ]
    steps = [step for phases in rounds for p in phases if p.epochs for step in p.steps]
    parameters = [n for n in shared if model.role(n) in ("body", "head", "norm")]
    untrained = [n for n in parameters if not any(step.trains(n) for step in steps)]
    if not (idle or untrained):
        return []
    parts = []
    if idle:
        parts.append(f"phase {', '.join(idle)} of {most} of local training has no epoch")
    if untrained:
        parts.append(f"no phase trains {join_first(untrained)}, which clients share")
    settings = {"train.epochs": train.epochs}
    if is_dataclass(method):
        names = [f.name for f in fields(method) if f.name.endswith("epochs")]
        settings |= {f"algorithm.{name}": getattr(method, name) for name in names}
    keys = ", ".join(f"{key} = {value}" for key, value in settings.items())
    return [f"{configs.algorithm_name(method)}: {'; '.join(parts)} ({keys})"]
