"""The parts of a run from its config, equal on every rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from .. import config as configs
from ..aggregation.flat_layout import joint_dtype
from ..aggregation.gathered import should_gather
from ..aggregation.term_layout import TermLayout
from ..aggregation.topology import MixingMatrix
from ..config import Config
from ..config.blocks import prefix_errors
from ..core.paths import expand_home
from ..core.scheduling import assign_groups
from ..data.partition import Split
from ..data.texts import Vocabulary
from ..engine.device import retain_freed_memory, select_device, silence_vmap_fallbacks
from ..engine.train import ClientFeed
from ..federation.client_store import DiskRows, MemoryRows, RowStorage
from ..federation.clients import Clients, ClientType
from ..federation.cohorts import Cohorts, group_clients
from ..federation.federation import Federation
from ..federation.placement import Placement
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from ..privacy.check import check_run
from ..privacy.protection import PrivateUploads
from ..privacy.settings import Privacy
from .agreement import reconcile_ranks
from .engine_choice import (
    RequestedPath,
    agree_on_device,
    check_workers,
    choose_engine,
    worker_ranks,
)
from .fingerprint import Inventory, run_digest
from .parts import Parts, load_data, make_parts, tell_hints


@dataclass(frozen=True)
class Assembly:
    """A run ready to start."""

    config: Config  # every ``auto`` decided
    federation: Federation
    split: Split
    sample_split: Split  # as in ``Parts``
    input_shape: tuple[int, ...]  # of one input
    run_digest: str  # of all that must not change on a resume
    vocabulary: Vocabulary | None = None  # of the texts
    token_settings: tuple[int, int] = (0, 0)  # number of token ids, token id of padding
    inventory: Inventory | None = None  # of what this rank has built
    outputs: int = 0  # of a network


def build(
    config: Config,
    source: str,
    comm: Comm,
    requested_path: RequestedPath = "",
    values_up_to: float = math.inf,
) -> Assembly:
    """Data, model, algorithm and groups.

    source: the config in messages; requested_path: the user's engine.path, if another;
    values_up_to: bytes; larger networks of this package have no values and so need no memory. Such
    a run can be counted but not started.

    Raises Refusal on all ranks for the user's mistakes. Rank 0 downloads while the others wait.
    """
    retain_freed_memory()
    silence_vmap_fallbacks()
    if config.data.source.download:
        collectively(comm, lambda: load_data(config, source) if comm.rank == 0 else None)
    workers = worker_ranks(config, comm.size)
    collectively(comm, lambda: check_workers(workers, source))
    worker = comm.local_rank - workers[0] if comm.rank in workers else None
    device = collectively(comm, lambda: select_device(config.engine, worker))
    config, memory = collectively(comm, lambda: agree_on_device(config, comm, workers, device))
    parts = collectively(
        comm,
        lambda: make_parts(
            config, source, comm.rank in workers, device, comm.heartbeat.beat, values_up_to
        ),
    )
    if comm.rank == 0:
        tell_hints(parts.data, source)
    local_inventory = None
    if parts.has_values:
        models, initial_variables, local_inventory = reconcile_ranks(
            comm,
            config,
            source,
            parts.data,
            parts.models,
            parts.split,
            parts.initial_variables,
            parts.matrix,
        )
        parts = parts._replace(models=models, initial_variables=initial_variables)
    engine = choose_engine(parts, config, source, comm, workers, memory, requested_path)
    assembly = collectively(
        comm,
        lambda: _assemble(parts, replace(config, engine=engine), source, comm, workers),
    )
    return replace(assembly, inventory=local_inventory)


def _assemble(
    parts: Parts,
    config: Config,
    source: str,
    comm: Comm,
    workers: Sequence[int],
) -> Assembly:
    data, split = parts.data, parts.split
    types = parts.client_types(config.train, config.engine)
    clients = _clients(parts, config, types, parts.sample_split)
    placement = _place(clients, config, comm, workers)
    tasks = [clients]
    if config.data.tasks:
        with prefix_errors(source, "data"):
            splits = config.data.tasks.split_by_task(split, *data.class_labels)
        tasks = [_with_split(parts, config, clients, task_split) for task_split in splits]
    cohorts = Cohorts(
        tuple(tasks),
        config.seed,
        config.participation,
        config.data.tasks.rounds if config.data.tasks else 1,
        config.privacy,
    )
    if parts.matrix:
        with prefix_errors(source, "topology"):
            _check_participants(parts.matrix, tasks)
    rows: dict[str, RowStorage] = {
        "memory": MemoryRows(),
        "device": MemoryRows(parts.device),
        "disk": DiskRows(expand_home(config.output)),
    }
    is_private = config.privacy != Privacy()
    with prefix_errors(source, "algorithm"):
        federation = Federation.build(
            parts.method,
            comm,
            cohorts,
            placement,
            clients,
            workers=workers,
            route=config.mix,
            reduce=config.reduce,
            gathers=not is_private and _gathers(clients, config),
            skip_nonfinite=config.faults.non_finite == "skip",
            protection=PrivateUploads(config.privacy, config.seed) if is_private else None,
            rows=rows[config.engine.personal],
            evaluate_cohort_only=config.evaluate.clients == "cohort",
            matrix=parts.matrix,
        )
    with prefix_errors(source, "privacy"):
        _check_privacy(config, federation)
    digest = ""
    if parts.has_values:
        digest = run_digest(config, split, data.vocabulary, parts.matrix)
    return Assembly(
        config,
        federation,
        split,
        parts.sample_split,
        data.shape,
        digest,
        data.vocabulary,
        (data.tokens, data.padding),
        outputs=data.classes,
    )


def _check_participants(matrix: MixingMatrix, tasks: Sequence[Clients]) -> None:
    """Raise ValueError if the clients with data are not connected in some task."""
    for clients in tasks:
        without_data = [c for c, size in enumerate(clients.sizes) if not size]
        if not matrix.is_connected({*range(len(clients))} - {*without_data}):
            ids = ", ".join(map(str, without_data[:10]))
            raise ValueError(
                f"client {ids} never takes part, without training samples, and the graph of the "
                "others is not connected; choose another topology, or give it samples"
            )


def _clients(parts: Parts, config: Config, types: tuple[ClientType, ...], split: Split) -> Clients:
    """All clients when they hold what ``split`` says; one without samples weighs nothing."""
    sizes = tuple(map(len, split.train))
    by_samples = parts.method.weights == "samples" and not config.privacy.is_differential
    weights = sizes if by_samples else tuple(min(size, 1) for size in sizes)
    return Clients(types, parts.type_of_client, sizes, weights)


def _with_split(parts: Parts, config: Config, clients: Clients, split: Split) -> Clients:
    """``clients`` when they hold what ``split`` says."""
    feed = parts.feed and parts.feed.with_split(split)
    types = tuple(
        replace(t, trainer=replace(t.trainer, feed=cast(ClientFeed, feed))) for t in clients.types
    )
    return _clients(parts, config, types, split)


def _place(clients: Clients, config: Config, comm: Comm, workers: Sequence[int]) -> Placement:
    """Groups of clients on the workers, by the estimated cost of their training."""
    group_size, sizes = config.engine.group_size, clients.sizes
    assert isinstance(group_size, int), group_size  # decided before
    width = group_size * (int(1 / config.participation) if config.engine.path != "loop" else 1)
    groups = group_clients(sizes, width, clients.type_of)
    costs = tuple(
        float(sum(sizes[c] for c in group) * clients[group[0]].trainer.model.flops)
        for group in groups
    )
    hosts = assign_groups(costs, workers)
    return Placement(comm.rank, groups, costs, hosts, group_size, clients.type_of)


def _gathers(clients: Clients, config: Config) -> bool:
    """Whether uploads travel as they are."""
    layouts = [t.upload_layout for t in clients.types]
    upload_bytes = (
        config.participation
        * sum(layouts[number].size for number in clients.type_of)
        * joint_dtype([layout.dtype for layout in layouts]).itemsize
    )
    first = clients.types[0]
    terms = TermLayout.of(first.untrained_term).flat
    expands = first.transport.expands
    return should_gather(config.uplink, expands, upload_bytes, terms, config.reduce)


def _check_privacy(config: Config, federation: Federation) -> None:
    """Raise ValueError where the run cannot be as private as asked."""
    cohorts = federation.cohorts
    rounds = [number * cohorts.task_rounds for number in range(len(cohorts.tasks))]
    smallest = min(len(cohorts.sample(round_).members) for round_ in rounds)
    types = [(t.transport, t.trainer.model, t.initial) for t in federation.clients.types]
    name, has_mixes = configs.algorithm_name(config.algorithm), bool(federation.aggregator.mixing)
    check_run(config.privacy, name, smallest, has_mixes, types, config.train)
