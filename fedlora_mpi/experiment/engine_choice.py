"""Which ranks host clients, on which device, by which path, in groups of which size."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, cast

import numpy as np
import torch

from .. import config as configs
from ..algorithm import LocalTraining
from ..config import Config
from ..config.blocks import prefix_errors
from ..engine.device import choose_path, memory_per_worker
from ..engine.rehearsal import rehearse_engine
from ..engine.settings import Engine
from ..engine.speed import Candidate, fastest_speed, measure_engines, summary_line
from ..models.network import Model
from ..models.zoo import is_external
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from .parts import Parts

_Path: TypeAlias = Literal["auto", "measure", "loop", "stack", "streams"]  # as in ``Engine``
RequestedPath: TypeAlias = _Path | Literal[""]
_DECIDED_PATHS: tuple[_Path, ...] = ("loop", "stack", "streams")


def worker_ranks(config: Config, size: int) -> range:
    """The ranks that host clients: all but the server, unless it is alone or asked to."""
    return range(0 if size == 1 or config.server_hosts_clients else 1, size)


def check_workers(workers: Sequence[int], source: str) -> None:
    if not workers:
        raise ValueError(f"{source}: server_hosts_clients = false: needs at least 2 ranks")


def decide_engine(
    config: Config, models: Sequence[Model], device: Literal["auto", "cpu", "cuda"], memory: int = 0
) -> Engine:
    """The engine, its path and group size decided by rule for the largest network.

    memory: bytes of a GPU.
    """
    largest = max(models, key=lambda model: model.flops)
    path, size = choose_path(
        config.engine, device, largest, config.train.batch_size, config.cohort, memory
    )
    return replace(config.engine, device=device, path=cast(_Path, path), group_size=size)


def agree_on_device(
    config: Config, comm: Comm, workers: Sequence[int], device: torch.device
) -> tuple[Config, int]:
    """The config with the device kind that all workers have, and each one's bytes of GPU memory.

    The bytes are 0 without a GPU.
    """
    gpu_bytes = np.zeros(comm.size, np.int64)
    shares_with_server = workers[0] > 0 and comm.rank == comm.local_rank  # this node
    gpu_bytes[comm.rank] = memory_per_worker(device, comm.local_size - shares_with_server)
    comm.sum(gpu_bytes)
    if gpu_bytes.any() and not all(gpu_bytes[rank] for rank in workers):
        ranks_without_gpu = [rank for rank in workers if not gpu_bytes[rank]]
        raise ValueError(
            f"engine.device = auto: ranks {ranks_without_gpu} have no GPU, the others do; set "
            "engine.device=cpu"
        )
    config = replace(
        config, engine=replace(config.engine, device="cuda" if gpu_bytes.any() else "cpu")
    )
    return config, int(min(gpu_bytes[rank] for rank in workers))


def choose_engine(
    parts: Parts,
    config: Config,
    source: str,
    comm: Comm,
    workers: Sequence[int],
    memory: int,
    requested_path: RequestedPath,
) -> Engine:
    """The engine with everything decided, by rule or by a measurement on the first worker."""

    def choose_on_worker() -> Engine | None:
        if comm.rank != workers[0]:
            return None
        if config.engine.path != "measure":
            engine = decide_engine(config, parts.models, config.engine.device, memory)
            return _rehearse(
                parts,
                config,
                source,
                engine,
                replace(config.engine, path=requested_path or config.engine.path),
            )
        stack = replace(config.engine, path="stack")
        engine = _rehearse(parts, config, source, stack, config.engine)
        if engine.path == "loop" and engine.device == "cpu":
            return engine
        # so that every worker has something to do
        max_group_size = -(-config.cohort // max(2, len(workers)))
        samples = (
            config.rounds
            * config.participation
            * config.train.epochs
            * sum(map(len, parts.sample_split.train))
        )
        speeds = measure_engines(
            config.engine,
            max_group_size,
            samples,
            lambda engine: _speed_candidates(parts, config.train, engine),
            can_stack=engine.path == "stack",
        )
        print(
            summary_line(speeds, fastest_engine := fastest_speed(speeds, samples)),
            file=sys.stderr,
            flush=True,
        )
        return fastest_engine.engine

    chosen_engine, choice = collectively(comm, choose_on_worker), np.zeros(3, np.int64)
    if chosen_engine:
        path_number = _DECIDED_PATHS.index(chosen_engine.path)
        choice[:] = path_number, chosen_engine.group_size, chosen_engine.compile
    comm.sum(choice)
    path, size, compiled = choice.tolist()
    return replace(
        config.engine, path=_DECIDED_PATHS[path], group_size=size, compile=bool(compiled)
    )


def _speed_candidates(parts: Parts, train: LocalTraining, engine: Engine) -> list[Candidate]:
    """For each network, the largest clients that an engine would train together."""
    candidates: dict[int, Candidate] = {}
    for number, kind in enumerate(parts.client_types(train, engine)):
        clients_of_kind = [
            client
            for client, type_number in enumerate(parts.type_of_client)
            if type_number == number
        ]
        largest = sorted(clients_of_kind, key=lambda client: -len(parts.sample_split.train[client]))
        client_count = 1
        if engine.path != "loop":
            assert isinstance(engine.group_size, int), engine.group_size
            client_count = engine.group_size
        candidates.setdefault(kind.network, (kind.trainer, kind.initial, largest[:client_count]))
    return list(candidates.values())


def _rehearse(
    parts: Parts, config: Config, source: str, engine: Engine, requested: Engine
) -> Engine:
    """``engine``, or the loop, as ``rehearse_engine`` finds; what this package brings needs
    no trial.
    """
    names, method = (
        [network.name for network in config.model.mix],
        configs.algorithm_name(config.algorithm),
    )
    loss, small = config.model.loss, getattr(config.algorithm, "small", "")
    if not any(map(is_external, (*names, method, loss, small))):
        return engine
    kinds = {
        kind.network: kind
        for kind in parts.client_types(config.train, replace(engine, path="loop", compile=False))
    }
    with prefix_errors(source):
        return rehearse_engine(
            engine,
            requested,
            [
                (names[network_number], kind.trainer, kind.initial)
                for network_number, kind in kinds.items()
            ],
            method,
            loss,
        )
