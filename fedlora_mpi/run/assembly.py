"""The parts of a run from its config, equal on every rank."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch

from .. import config as configs
from ..aggregation.client_mix import Mixing
from ..aggregation.flat_layout import Layout, joint_dtype
from ..aggregation.gathered import should_gather
from ..algorithm import Algorithm, LocalTraining, Variables, check_trainable
from ..config import Config
from ..config.blocks import prefix_errors
from ..core.names import display_name
from ..core.paths import expand_home
from ..core.scheduling import assign_groups
from ..core.seeds import rng
from ..data.datasets import Data, load
from ..data.feed import Feed
from ..data.partition import Split
from ..data.texts import Vocabulary
from ..engine.compiled import StepCompiler, need_compiler
from ..engine.device import choose_path, memory_per_worker, retain_freed_memory, select_device
from ..engine.graphs import GraphCache
from ..engine.rehearsal import rehearse_engine
from ..engine.settings import Engine
from ..engine.speed import Candidate, fastest_speed, measure_engines, summary_line
from ..engine.train import ClientFeed, Trainer
from ..federation.client_rows import DiskRows, MemoryRows
from ..federation.cohorts import group_clients
from ..federation.federation import ClientType, Run, Throughput
from ..models.network import Model
from ..models.zoo import build as build_model
from ..models.zoo import is_external
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from ..privacy.check import check_run
from ..privacy.settings import Privacy
from ..store.sinks import import_tensorboard
from .agreement import reconcile_ranks
from .fingerprint import Inventory, run_digest

_Path: TypeAlias = Literal["auto", "measure", "loop", "stack"]  # as in ``Engine``
_RequestedPath: TypeAlias = _Path | Literal[""]


@dataclass(frozen=True)
class Assembly:
    """A run ready to start."""

    config: Config  # every ``auto`` decided
    run: Run
    split: Split
    input_shape: tuple[int, ...]  # of one input
    run_digest: str  # of all that must not change on a resume
    vocabulary: Vocabulary | None = None  # of the texts
    inventory: Inventory | None = None  # of what this rank has built


def build(config: Config, source: str, comm: Comm, requested_path: _RequestedPath = "") -> Assembly:
    """Data, model, algorithm and groups.

    source: the config in messages; requested_path: the user's engine.path, if another.

    Raises Refusal on all ranks for the user's mistakes. Rank 0 downloads while the others wait.
    """
    retain_freed_memory()
    if config.data.source.download:
        collectively(comm, lambda: load_data(config, source) if comm.rank == 0 else None)
    workers = worker_ranks(config, comm.size)
    collectively(comm, lambda: _check_workers(workers, source))
    worker = comm.local_rank - workers[0] if comm.rank in workers else None
    device = collectively(comm, lambda: select_device(config.engine, worker))
    config, memory = collectively(comm, lambda: _agree_on_device(config, comm, workers, device))
    parts = collectively(
        comm, lambda: _make_parts(config, source, comm.rank in workers, device, comm.heartbeat.beat)
    )
    if comm.rank == 0:
        tell_hints(parts.data, source)
    models, initial_variables, local_inventory = reconcile_ranks(
        comm, config, source, parts.data, parts.models, parts.split, parts.initial_variables
    )
    parts = parts._replace(models=models, initial_variables=initial_variables)
    engine = _choose_engine(parts, config, source, comm, workers, memory, requested_path)
    assembly = collectively(
        comm, lambda: _assemble(parts, replace(config, engine=engine), source, comm, workers)
    )
    return replace(assembly, inventory=local_inventory)


def worker_ranks(config: Config, size: int) -> range:
    """The ranks that host clients: all but the server, unless it is alone or asked to."""
    return range(0 if size == 1 or config.server_hosts_clients else 1, size)


def load_data(config: Config, source: str) -> Data:
    """The data set of a config."""
    with prefix_errors(source, "data"):
        return load(config.data.source)


def tell_hints(data: Data, source: str) -> None:
    """Say on stderr what is odd about the files of a data set, a line each."""
    for hint in data.hints:
        print(f"hint: {source}: data.{hint.removeprefix('data.')}", file=sys.stderr, flush=True)


def load_models(config: Config, source: str, data: Data) -> tuple[Model, ...]:
    """The networks of a config, each checked against its algorithm."""
    models, builder_inputs = [], (data.classes, data.shape, config.seed, data.tokens, data.padding)
    for network in config.model.mix:
        if network.name == "hf" and data.vocabulary and not config.data.source.text.tokenizer:
            reason = "network hf reads the tokens of its own tokenizer; give it"
            raise ValueError(f"{source}: data.text.tokenizer = null: {reason}")
        with prefix_errors(source, "model"):
            models.append(
                build_model(network.name, network.options, *builder_inputs, weights=network.weights)
            )
        with prefix_errors(source, "algorithm"):
            config.algorithm.check(models[-1], config.train)
    return tuple(models)


def split_data(config: Config, source: str, data: Data) -> Split:
    """Who has which samples."""
    owners = {"owners": data.owners} if data.owners else {}
    with prefix_errors(source, "data"):
        return config.data.partition.split(
            data.train.y.numpy(), data.test.y.numpy(), data.classes, **owners
        )


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


def _check_workers(workers: Sequence[int], source: str) -> None:
    if not workers:
        raise ValueError(f"{source}: server_hosts_clients = false: needs at least 2 ranks")


def _agree_on_device(
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


class _Parts(NamedTuple):
    """What a run is made of, whatever its engine."""

    data: Data
    models: tuple[Model, ...]
    split: Split
    feed: Feed | None  # a server that hosts nobody keeps no images
    # the kinds of clients: number of the network, the method
    variants: Sequence[tuple[int, Algorithm]]
    kind_of_client: tuple[int, ...]  # of each client
    initial_variables: Sequence[Variables]  # of each kind
    device: torch.device

    def kinds(self, train: LocalTraining, engine: Engine) -> tuple[ClientType, ...]:
        """The kinds of clients as an engine trains them."""
        prefixes = (
            [f"kind-{number}/" for number in range(len(self.variants))]
            if len(self.variants) > 1
            else [""]
        )
        networks, stacked = [model.to(self.device) for model in self.models], engine.path == "stack"
        make_compiler = StepCompiler if engine.compile else lambda: None
        uses_graphs = self.device.type == "cuda" if engine.graphs == "auto" else engine.graphs
        make_graphs = (lambda: GraphCache(self.device)) if uses_graphs else lambda: None
        return tuple(
            ClientType(
                Trainer(
                    variant,
                    networks[network_number],
                    train,
                    cast(ClientFeed, self.feed),  # None on a server, which trains nobody
                    self.device,
                    stacked,
                    make_compiler(),
                    make_graphs(),
                    engine.precision,
                ),
                initial,
                prefix,
                network_number,
            )
            for (network_number, variant), initial, prefix in zip(
                self.variants, self.initial_variables, prefixes, strict=True
            )
        )

    def speed_candidates(self, train: LocalTraining, engine: Engine) -> list[Candidate]:
        """For each network, the largest clients that an engine would train together."""
        candidates: dict[int, Candidate] = {}
        for number, kind in enumerate(self.kinds(train, engine)):
            clients_of_kind = [
                client
                for client, kind_number in enumerate(self.kind_of_client)
                if kind_number == number
            ]
            largest = sorted(clients_of_kind, key=lambda client: -len(self.split.train[client]))
            client_count = 1
            if engine.path == "stack":
                assert isinstance(engine.group_size, int), engine.group_size
                client_count = engine.group_size
            candidates.setdefault(
                kind.network, (kind.trainer, kind.initial, largest[:client_count])
            )
        return list(candidates.values())

    def rehearse(self, config: Config, source: str, engine: Engine, requested: Engine) -> Engine:
        """``engine``, or the loop, as ``rehearse_engine`` finds; what this package brings needs
        no trial.
        """
        names, method = (
            [network.name for network in config.model.mix],
            configs.algorithm_name(config.algorithm),
        )
        if not any(map(is_external, (*names, method, getattr(config.algorithm, "small", "")))):
            return engine
        kinds = {
            kind.network: kind
            for kind in self.kinds(config.train, replace(engine, path="loop", compile=False))
        }
        with prefix_errors(source):
            return rehearse_engine(
                engine,
                requested,
                [
                    (names[network_number], kind.trainer, kind.initial)
                    for network_number, kind in kinds.items()
                ],
            )


def _make_parts(
    config: Config, source: str, hosts_clients: bool, device: torch.device, beat: Callable[[], None]
) -> _Parts:
    """``hosts_clients``: whether this rank trains clients; ``beat``: ``on_batch`` of ``Feed``."""
    data = load_data(config, source)
    models = load_models(config, source, data)
    split = split_data(config, source, data)
    feed = None
    if hosts_clients:
        with prefix_errors(source, "data"):
            feed = Feed(
                data,
                split,
                seed=config.seed,
                shift=config.data.source.shift,
                device=device,
                augment=True,
                on_batch=beat,
            )
    variants, kind_of = client_variants(config)
    with prefix_errors(source, "algorithm"):
        initial_variables = _initial_variables(config, variants, models)
        for (number, method), initial in zip(variants, initial_variables, strict=True):
            network = config.model.mix[number].name
            check_trainable(
                configs.algorithm_name(method),
                method,
                network,
                models[number],
                config.train,
                initial,
            )
    if config.engine.compile:
        with prefix_errors(source, "engine"):
            need_compiler()
    if config.log.tensorboard:
        with prefix_errors(source, "log"):
            import_tensorboard()
    return _Parts(data, models, split, feed, variants, kind_of, initial_variables, device)


def _choose_engine(
    parts: _Parts,
    config: Config,
    source: str,
    comm: Comm,
    workers: Sequence[int],
    memory: int,
    requested_path: _RequestedPath,
) -> Engine:
    """The engine with everything decided, by rule or by a measurement on the first worker."""

    def choose_on_worker() -> Engine | None:
        if comm.rank != workers[0]:
            return None
        if config.engine.path != "measure":
            engine = decide_engine(config, parts.models, config.engine.device, memory)
            return parts.rehearse(
                config,
                source,
                engine,
                replace(config.engine, path=requested_path or config.engine.path),
            )
        if (
            engine := parts.rehearse(
                config, source, replace(config.engine, path="stack"), config.engine
            )
        ).path == "loop":
            return engine
        # so that every worker has something to do
        max_group_size = -(-config.cohort // max(2, len(workers)))
        samples = (
            config.rounds
            * config.participation
            * config.train.epochs
            * sum(map(len, parts.split.train))
        )
        speeds = measure_engines(
            config.engine,
            max_group_size,
            samples,
            lambda engine: parts.speed_candidates(config.train, engine),
        )
        print(
            summary_line(speeds, fastest_engine := fastest_speed(speeds, samples)),
            file=sys.stderr,
            flush=True,
        )
        return fastest_engine.engine

    chosen_engine, choice = collectively(comm, choose_on_worker), np.zeros(3, np.int64)
    if chosen_engine:
        choice[:] = chosen_engine.path == "stack", chosen_engine.group_size, chosen_engine.compile
    comm.sum(choice)
    path, size, compiled = choice.tolist()
    return replace(
        config.engine, path="stack" if path else "loop", group_size=size, compile=bool(compiled)
    )


def _assemble(
    parts: _Parts, config: Config, source: str, comm: Comm, workers: Sequence[int]
) -> Assembly:
    data, split, kind_of = parts.data, parts.split, parts.kind_of_client
    algorithm, sizes = config.algorithm, [len(indices) for indices in split.train]
    kinds = parts.kinds(config.train, config.engine)
    group_size = config.engine.group_size
    assert isinstance(group_size, int), group_size  # decided before
    group_width = group_size * (
        int(1 / config.participation) if config.engine.path == "stack" else 1
    )
    grouped = group_clients(sizes, group_width, kind_of)
    costs = tuple(
        float(sum(sizes[c] for c in group) * kinds[kind_of[group[0]]].trainer.model.flops)
        for group in grouped
    )
    rank_of_group = assign_groups(costs, workers)
    rank_of = {c: rank for group, rank in zip(grouped, rank_of_group, strict=True) for c in group}
    uploads, term = (
        [Layout.of(kind.untrained_upload) for kind in kinds],
        Layout.of(kinds[0].untrained_term),
    )
    gathered_bytes = (
        config.participation
        * sum(uploads[kind].size for kind in kind_of)
        * joint_dtype([u.dtype for u in uploads]).itemsize
    )
    run = Run(
        algorithm=algorithm,
        kinds=kinds,
        kind_of=kind_of,
        comm=comm,
        groups=grouped,
        costs=costs,
        rank_of_group=rank_of_group,
        throughput=Throughput(len(kinds)),
        group_size=group_size,
        sizes=tuple(sizes),
        weight_N=_client_weights(algorithm, sizes, config.privacy),
        seed=config.seed,
        participation=config.participation,
        reduce=config.reduce,
        upload_layout=term,
        gather_uploads=config.privacy == Privacy()
        and should_gather(config.uplink, algorithm, gathered_bytes, term, config.reduce),
        skip_nonfinite=config.faults.non_finite == "skip",
        evaluate_cohort_only=config.evaluate.clients == "cohort",
        personal_rows=DiskRows(expand_home(config.output))
        if config.engine.personal == "disk"
        else MemoryRows(),
        mixing=Mixing.of(
            algorithm,
            kinds[0].initial,
            [rank_of[c] for c in range(len(sizes))],
            workers,
            config.mix,
        ),
        privacy=config.privacy,
    )
    if tasks := config.data.tasks:
        with prefix_errors(source, "data"):
            task_splits = tasks.split_by_task(split, data.train.y.numpy(), data.test.y.numpy())
        run = replace(
            run,
            task_runs=tuple(_with_split(run, task_split) for task_split in task_splits),
            task_rounds=tasks.rounds,
        )
    with prefix_errors(source, "privacy"):
        _check_privacy(config, run)
    digest = run_digest(config, split, data.vocabulary)
    return Assembly(config, run, split, data.shape, digest, data.vocabulary)


def _client_weights(
    algorithm: Algorithm, sizes: Sequence[int], privacy: Privacy
) -> tuple[int, ...]:
    """What the upload of each client counts in the mean: nothing when it holds no sample."""
    by_samples = algorithm.weights == "samples" and not privacy.is_differential
    return tuple(sizes if by_samples else (min(size, 1) for size in sizes))


def _check_privacy(config: Config, run: Run) -> None:
    """Raise ValueError where the run cannot be as private as asked."""
    cohort = min(len(task_run.sample_cohort(0)) for task_run in run.task_runs or [run])
    kinds = [(kind.algorithm, kind.trainer.model, kind.initial) for kind in run.kinds]
    name = configs.algorithm_name(config.algorithm)
    check_run(config.privacy, name, cohort, run.mixing is not None, kinds, config.train)


def _with_split(run: Run, split: Split) -> Run:
    """``run`` when its clients hold what ``split`` says, in the same groups on the same ranks."""
    feed, sizes = run.trainer.feed, tuple(map(len, split.train))
    assert feed is None or isinstance(feed, Feed), type(feed)
    feed = feed and feed.with_split(split)
    kinds = tuple(kind._replace(trainer=replace(kind.trainer, feed=feed)) for kind in run.kinds)
    return replace(
        run, kinds=kinds, sizes=sizes, weight_N=_client_weights(run.algorithm, sizes, run.privacy)
    )


def client_variants(config: Config) -> tuple[list[tuple[int, Algorithm]], tuple[int, ...]]:
    """The kinds of clients, (number of the network, the method as they have it), and the kind of
    each client, [N].
    """
    network_of = config.model.network_of_clients(clients := config.data.partition.clients)
    variant_of_client = [
        (network, config.algorithm.for_client(client, clients))
        for client, network in enumerate(network_of)
    ]
    variants = sorted(dict.fromkeys(variant_of_client), key=lambda variant: variant[0])
    return variants, tuple(map(variants.index, variant_of_client))


def _initial_variables(
    config: Config, variants: Sequence[tuple[int, Algorithm]], models: Sequence[Model]
) -> list[Variables]:
    """The variables before round 1 of each kind of clients; the shared ones are the method's with
    the first network.

    Raises ValueError when networks differ in what the algorithm shares or mixes.
    """
    algorithm, names = config.algorithm, [config.model.mix[network].name for network, _ in variants]

    def initialize(method, model):
        return method.init(model, rng(config.seed, "init"))

    initial_variables = [
        Variables(
            initialize(algorithm, models[network]).shared,
            initialize(variant, models[network]).personal,
        )
        for network, variant in variants
    ]
    for initial in initial_variables:
        if clashing_leaves := initial.shared.keys() & initial.personal.keys():
            raise ValueError(
                f"name = {configs.algorithm_name(algorithm)}: has a leaf "
                f"{display_name(min(clashing_leaves))} of its own, and so has the network; rename "
                "that part of the network"
            )
    mixes = [algorithm.offer(first, first) for first in initial_variables]
    for verb, trees in (
        ("shares", [v.shared for v in initial_variables]),
        ("mixes", [o.rows if o else {} for o in mixes]),
    ):
        layouts = [Layout.of(tree).leaf_descriptions for tree in trees]
        for name, layout in zip(names, layouts, strict=True):
            if layout != layouts[0]:
                leaf = next(n for n in layouts[0] | layout if layouts[0].get(n) != layout.get(n))
                shapes = " and ".join(
                    leaf_shapes.get(leaf, "none") for leaf_shapes in (layouts[0], layout)
                )
                raise ValueError(
                    f"name = {configs.algorithm_name(algorithm)}: {verb} {display_name(leaf)}, "
                    f"which networks {names[0]} and {name} have in different shapes ({shapes}); "
                    "for a mix of networks choose a method that shares only what they have in "
                    "common, such as pfedlora"
                )
    return [first._replace(shared=initial_variables[0].shared) for first in initial_variables]
