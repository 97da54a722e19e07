"""The parts of a run from its config, equal on every rank."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from .. import config as configs
from ..aggregation.client_mix import Mixing
from ..aggregation.flat_layout import Layout, joint_dtype
from ..aggregation.gathered import should_gather
from ..algorithm import Algorithm, LocalTraining, Variables, check_trainable
from ..config import Config
from ..config.blocks import naming
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
from ..engine.train import Trainer
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
from ..store.sinks import need_tensorboard
from .agreement import agreed
from .fingerprint import Inventory, run_digest


@dataclass(frozen=True)
class Assembly:
    """A run ready to start."""

    config: Config  # every ``auto`` decided
    run: Run
    split: Split
    shape: tuple[int, ...]  # of one input
    digest: str  # of all that must not change on a resume
    vocabulary: Vocabulary | None = None  # of the texts
    inventory: Inventory | None = None  # of what this rank has built


def build(config: Config, source: str, comm: Comm, asked: str = "") -> Assembly:
    """Data, model, algorithm and groups; source: the config in messages; asked: the user's
    engine.path, if another.

    Raises Refused on all ranks for the user's mistakes. Rank 0 downloads while the others wait.
    """
    retain_freed_memory()
    if config.data.source.download:
        collectively(comm, lambda: load_data(config, source) if comm.rank == 0 else None)
    workers = hosts(config, comm.size)
    collectively(comm, lambda: _need(workers, source))
    worker = comm.local_rank - workers[0] if comm.rank in workers else None
    device = collectively(comm, lambda: select_device(config.engine, worker))
    config, memory = collectively(comm, lambda: _same_device(config, comm, workers, device))
    parts = collectively(
        comm, lambda: _parts(config, source, comm.rank in workers, device, comm.heartbeat.beat)
    )
    if comm.rank == 0:
        tell_hints(parts.data, source)
    models, firsts, found = agreed(
        comm, config, source, parts.data, parts.models, parts.split, parts.firsts
    )
    parts = parts._replace(models=models, firsts=firsts)
    engine = _engine(parts, config, source, comm, workers, memory, asked)
    built = collectively(
        comm, lambda: _build(parts, replace(config, engine=engine), source, comm, workers)
    )
    return replace(built, inventory=found)


def hosts(config: Config, size: int) -> range:
    """The ranks that host clients: all but the server, unless it is alone or asked to."""
    return range(0 if size == 1 or config.server_hosts_clients else 1, size)


def load_data(config: Config, source: str) -> Data:
    """The data set of a config."""
    with naming(source, "data"):
        return load(config.data.source)


def tell_hints(data: Data, source: str) -> None:
    """Say on stderr what is odd about the files of a data set, a line each."""
    for hint in data.hints:
        print(f"hint: {source}: data.{hint.removeprefix('data.')}", file=sys.stderr, flush=True)


def load_models(config: Config, source: str, data: Data) -> tuple[Model, ...]:
    """The networks of a config, each checked against its algorithm."""
    models, inputs = [], (data.classes, data.shape, config.seed, data.tokens, data.padding)
    for network in config.model.mix:
        if network.name == "hf" and data.vocabulary and not config.data.source.text.tokenizer:
            reason = "network hf reads the tokens of its own tokenizer; give it"
            raise ValueError(f"{source}: data.text.tokenizer = null: {reason}")
        with naming(source, "model"):
            models.append(
                build_model(network.name, network.options, *inputs, weights=network.weights)
            )
        with naming(source, "algorithm"):
            config.algorithm.check(models[-1], config.train)
    return tuple(models)


def split_data(config: Config, source: str, data: Data) -> Split:
    """Who has which samples."""
    given = {"owners": data.owners} if data.owners else {}
    with naming(source, "data"):
        return config.data.partition.split(
            data.train.y.numpy(), data.test.y.numpy(), data.classes, **given
        )


def decided(config: Config, models: Sequence[Model], device: str, memory: int = 0) -> Engine:
    """The engine with its path and group size decided by rule, for the largest network and the
    ``memory`` of a GPU, bytes.
    """
    largest = max(models, key=lambda model: model.flops)
    path, size = choose_path(
        config.engine, device, largest, config.train.batch_size, config.cohort, memory
    )
    return replace(config.engine, device=device, path=path, group_size=size)


def _need(workers: Sequence[int], source: str) -> None:
    if not workers:
        raise ValueError(f"{source}: server_hosts_clients = false: needs at least 2 ranks")


def _same_device(
    config: Config, comm: Comm, workers: Sequence[int], device: torch.device
) -> tuple[Config, int]:
    """The config with ``engine.device`` decided, the kind of device that all workers have; and the
    bytes of a GPU that each of them may use, 0 without.
    """
    with_gpu = np.zeros(comm.size, np.int64)
    with_server = workers[0] > 0 and comm.rank == comm.local_rank  # this node
    with_gpu[comm.rank] = memory_per_worker(device, comm.local_size - with_server)
    comm.sum(with_gpu)
    if with_gpu.any() and not all(with_gpu[rank] for rank in workers):
        without = [rank for rank in workers if not with_gpu[rank]]
        raise ValueError(
            f"engine.device = auto: ranks {without} have no GPU, the others do; set "
            "engine.device=cpu"
        )
    config = replace(
        config, engine=replace(config.engine, device="cuda" if with_gpu.any() else "cpu")
    )
    return config, int(min(with_gpu[rank] for rank in workers))


class _Parts(NamedTuple):
    """What a run is made of, whatever its engine."""

    data: Data
    models: tuple[Model, ...]
    split: Split
    feed: Feed | None  # a server that hosts nobody keeps no images
    # the kinds of clients: number of the network, the method
    variants: Sequence[tuple[int, Algorithm]]
    kind_of: tuple[int, ...]  # of each client
    firsts: Sequence[Variables]  # of each kind
    device: torch.device

    def kinds(self, train: LocalTraining, engine: Engine) -> tuple[ClientType, ...]:
        """The kinds of clients as an engine trains them."""
        prefixes = (
            [f"kind-{number}/" for number in range(len(self.variants))]
            if len(self.variants) > 1
            else [""]
        )
        networks, stacked = [model.to(self.device) for model in self.models], engine.path == "stack"
        compiled = StepCompiler if engine.compile else lambda: None
        recorded = self.device.type == "cuda" if engine.graphs == "auto" else engine.graphs
        graphs = (lambda: GraphCache(self.device)) if recorded else lambda: None
        return tuple(
            ClientType(
                Trainer(
                    variant,
                    networks[at],
                    train,
                    self.feed,
                    self.device,
                    stacked,
                    compiled(),
                    graphs(),
                    engine.precision,
                ),
                first,
                prefix,
                at,
            )
            for (at, variant), first, prefix in zip(
                self.variants, self.firsts, prefixes, strict=True
            )
        )

    def tried(self, train: LocalTraining, engine: Engine) -> list[Candidate]:
        """For each network, the largest clients that an engine would train together."""
        found = {}
        for number, kind in enumerate(self.kinds(train, engine)):
            alike = [client for client, of in enumerate(self.kind_of) if of == number]
            largest = sorted(alike, key=lambda client: -len(self.split.train[client]))
            together = engine.group_size if engine.path == "stack" else 1
            found.setdefault(kind.network, (kind.trainer, kind.initial, largest[:together]))
        return list(found.values())

    def rehearsed(self, config: Config, source: str, engine: Engine, asked: Engine) -> Engine:
        """``engine``, or the loop, as ``rehearsal.rehearsed`` finds; what this package brings needs
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
        with naming(source):
            return rehearse_engine(
                engine,
                asked,
                [(names[at], kind.trainer, kind.initial) for at, kind in kinds.items()],
            )


def _parts(
    config: Config, source: str, hosting: bool, device: torch.device, beat: Callable[[], None]
) -> _Parts:
    """``hosting``: whether this rank trains clients; ``beat``: see ``Feed``."""
    data = load_data(config, source)
    models = load_models(config, source, data)
    split = split_data(config, source, data)
    feed = None
    if hosting:
        with naming(source, "data"):
            options = {"seed": config.seed, "shift": config.data.source.shift, "device": device}
            feed = Feed(data, split, **options, augment=True, on_batch=beat)
    variants, kind_of = variants_of(config)
    with naming(source, "algorithm"):
        firsts = _begun(config, variants, models)
        for (number, method), first in zip(variants, firsts, strict=True):
            network = config.model.mix[number].name
            check_trainable(
                configs.algorithm_name(method), method, network, models[number], config.train, first
            )
    if config.engine.compile:
        with naming(source, "engine"):
            need_compiler()
    if config.log.tensorboard:
        with naming(source, "log"):
            need_tensorboard()
    return _Parts(data, models, split, feed, variants, kind_of, firsts, device)


def _engine(
    parts: _Parts,
    config: Config,
    source: str,
    comm: Comm,
    workers: Sequence[int],
    memory: int,
    asked: str,
) -> Engine:
    """The engine, with everything decided: by rule or as the first worker has measured it, and
    tried there for all.
    """

    def choose() -> Engine | None:
        if comm.rank != workers[0]:
            return None
        if config.engine.path != "measure":
            engine = decided(config, parts.models, config.engine.device, memory)
            return parts.rehearsed(
                config, source, engine, replace(config.engine, path=asked or config.engine.path)
            )
        if (
            engine := parts.rehearsed(
                config, source, replace(config.engine, path="stack"), config.engine
            )
        ).path == "loop":
            return engine
        most = -(-config.cohort // max(2, len(workers)))  # so that every worker has something to do
        samples = (
            config.rounds
            * config.participation
            * config.train.epochs
            * sum(map(len, parts.split.train))
        )
        speeds = measure_engines(
            config.engine, most, samples, lambda engine: parts.tried(config.train, engine)
        )
        print(
            summary_line(speeds, best := fastest_speed(speeds, samples)),
            file=sys.stderr,
            flush=True,
        )
        return best.engine

    found, chosen = collectively(comm, choose), np.zeros(3, np.int64)
    if found:
        chosen[:] = found.path == "stack", found.group_size, found.compile
    comm.sum(chosen)
    path, size, compiled = chosen.tolist()
    return replace(
        config.engine, path="stack" if path else "loop", group_size=size, compile=bool(compiled)
    )


def _build(
    parts: _Parts, config: Config, source: str, comm: Comm, workers: Sequence[int]
) -> Assembly:
    data, split, kind_of = parts.data, parts.split, parts.kind_of
    algorithm, sizes = config.algorithm, [len(indices) for indices in split.train]
    kinds = parts.kinds(config.train, config.engine)
    width = config.engine.group_size * (
        int(1 / config.participation) if config.engine.path == "stack" else 1
    )
    grouped = group_clients(sizes, width, kind_of)
    costs = tuple(
        float(sum(sizes[c] for c in group) * kinds[kind_of[group[0]]].trainer.model.flops)
        for group in grouped
    )
    host = assign_groups(costs, workers)
    rank_of = {c: rank for group, rank in zip(grouped, host, strict=True) for c in group}
    uploads, term = (
        [Layout.of(kind.untrained_upload) for kind in kinds],
        Layout.of(kinds[0].untrained_term),
    )
    sent = (
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
        rank_of_group=host,
        throughput=Throughput(len(kinds)),
        group_size=config.engine.group_size,
        sizes=tuple(sizes),
        weight_N=_weights(algorithm, sizes, config.privacy),
        seed=config.seed,
        participation=config.participation,
        reduce=config.reduce,
        upload_layout=term,
        gather_uploads=config.privacy == Privacy()
        and should_gather(config.uplink, algorithm, sent, term, config.reduce),
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
        with naming(source, "data"):
            parts = tasks.split_by_task(split, data.train.y.numpy(), data.test.y.numpy())
        run = replace(
            run, task_runs=tuple(_holding(run, part) for part in parts), task_rounds=tasks.rounds
        )
    with naming(source, "privacy"):
        _check_privacy(config, run)
    digest = run_digest(config, split, data.vocabulary)
    return Assembly(config, run, split, data.shape, digest, data.vocabulary)


def _weights(algorithm: Algorithm, sizes: Sequence[int], privacy: Privacy) -> tuple[int, ...]:
    """What the upload of each client counts in the mean: nothing when it holds no sample."""
    by_samples = algorithm.weights == "samples" and not privacy.is_differential
    return tuple(sizes if by_samples else (min(size, 1) for size in sizes))


def _check_privacy(config: Config, run: Run) -> None:
    """Raise ValueError where the run cannot be as private as asked."""
    cohort = min(len(part.sample_cohort(0)) for part in run.task_runs or [run])
    kinds = [(kind.algorithm, kind.trainer.model, kind.initial) for kind in run.kinds]
    name = configs.algorithm_name(config.algorithm)
    check_run(config.privacy, name, cohort, run.mixing is not None, kinds, config.train)


def _holding(run: Run, split: Split) -> Run:
    """``run`` when its clients hold what ``split`` says, in the same groups on the same ranks."""
    feed, sizes = run.trainer.feed, tuple(map(len, split.train))
    feed = feed and feed.with_split(split)
    kinds = tuple(kind._replace(trainer=replace(kind.trainer, feed=feed)) for kind in run.kinds)
    return replace(
        run, kinds=kinds, sizes=sizes, weight_N=_weights(run.algorithm, sizes, run.privacy)
    )


def variants_of(config: Config) -> tuple[list[tuple[int, Algorithm]], tuple[int, ...]]:
    """The kinds of clients, (number of the network, the method as they have it), and the kind of
    each client, [N].
    """
    network_of = config.model.of_clients(clients := config.data.partition.clients)
    of = [
        (network, config.algorithm.for_client(client, clients))
        for client, network in enumerate(network_of)
    ]
    variants = sorted(dict.fromkeys(of), key=lambda variant: variant[0])
    return variants, tuple(map(variants.index, of))


def _begun(
    config: Config, variants: Sequence[tuple[int, Algorithm]], models: Sequence[Model]
) -> list[Variables]:
    """The variables before round 1 of each kind of clients; the shared ones are the method's with
    the first network.

    Raises ValueError when networks differ in what the algorithm shares or mixes.
    """
    algorithm, names = config.algorithm, [config.model.mix[network].name for network, _ in variants]

    def init(method, model):
        return method.init(model, rng(config.seed, "init"))

    firsts = [
        Variables(init(algorithm, models[network]).shared, init(variant, models[network]).personal)
        for network, variant in variants
    ]
    for first in firsts:
        if both := first.shared.keys() & first.personal.keys():
            raise ValueError(
                f"name = {configs.algorithm_name(algorithm)}: has a leaf {display_name(min(both))} "
                "of its own, and so has the network; rename that part of the network"
            )
    offers = [algorithm.offer(first, first) for first in firsts]
    for part, trees in (
        ("shares", [v.shared for v in firsts]),
        ("mixes", [o.rows if o else {} for o in offers]),
    ):
        layouts = [Layout.of(tree).leaf_descriptions for tree in trees]
        for name, layout in zip(names, layouts, strict=True):
            if layout != layouts[0]:
                leaf = next(n for n in layouts[0] | layout if layouts[0].get(n) != layout.get(n))
                shapes = " and ".join(at.get(leaf, "none") for at in (layouts[0], layout))
                raise ValueError(
                    f"name = {configs.algorithm_name(algorithm)}: {part} {display_name(leaf)}, "
                    f"which networks {names[0]} and {name} have in different shapes ({shapes}); "
                    "for a mix of networks choose a method that shares only what they have in "
                    "common, such as pfedlora"
                )
    return [first._replace(shared=firsts[0].shared) for first in firsts]
