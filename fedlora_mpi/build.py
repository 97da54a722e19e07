"""The parts of a run from its config, equal on every rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import config as configs
from .algorithm import Vars
from .comm import Comm, together
from .config import Config
from .data.datasets import Data, load
from .data.feed import Feed
from .data.partition import Split
from .engine.device import bind, decide, keep_memory
from .engine.train import Trainer
from .layout import Layout
from .mixing import Mixing
from .models.network import Model
from .models.zoo import build as build_model
from .placement import assign, groups
from .round import Run
from .seeds import rng


@dataclass(frozen=True)
class Built:
    """A run ready to start."""

    config: Config  # every ``auto`` decided
    run: Run
    split: Split
    shape: tuple[int, ...]  # of one input
    first: Vars  # the variables of any client before round 1
    digest: str  # of all that must not change on a resume


def build(config: Config, source: str, comm: Comm) -> Built:
    """Data, model, algorithm and groups; ``source`` names the config in messages.

    Raises Refused on all ranks for the user's mistakes. Rank 0 downloads while the others wait.
    """
    keep_memory()
    if config.data.source.download:
        together(comm, lambda: load_data(config, source) if comm.rank == 0 else None)
    workers = hosts(config, comm.size)
    together(comm, lambda: _need(workers, source))
    worker = comm.local_rank - workers[0] if comm.rank in workers else None
    device = together(comm, lambda: bind(config.engine, worker))
    config = together(comm, lambda: _same_device(config, comm, workers, device))
    return together(comm, lambda: _build(config, source, comm, workers, device))


def hosts(config: Config, size: int) -> range:
    """The ranks that host clients: all but the server, unless it is alone or asked to."""
    return range(0 if size == 1 or config.server_hosts_clients else 1, size)


def load_data(config: Config, source: str) -> Data:
    """The data set of a config."""
    with naming(source, "data"):
        return load(config.data.source)


def load_model(config: Config, source: str, data: Data) -> Model:
    """The network of a config, checked against its algorithm."""
    with naming(source, "model"):
        model = build_model(
            config.model.name, config.model.options, data.classes, tuple(data.train.x.shape[1:]), config.seed
        )
    with naming(source, "algorithm"):
        config.algorithm.check(model, config.train)
    return model


def split_data(config: Config, source: str, data: Data) -> Split:
    """Who has which samples."""
    with naming(source, "data"):
        return config.data.partition.split(data.train.y.numpy(), data.test.y.numpy(), data.classes)


def decided(config: Config, model: Model, device: str) -> Config:
    """The config with the engine's path and group size decided."""
    clients = config.data.partition.clients
    path, size = decide(config.engine, device, model, config.train.batch_size, clients)
    return replace(config, engine=replace(config.engine, device=device, path=path, group_size=size))


@contextmanager
def naming(source: str, block: str) -> Iterator[None]:
    """Put file and block before what a part says of "key = value"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {block}.{str(error).removeprefix(f'{block}.')}") from error


def _need(workers: Sequence[int], source: str) -> None:
    if not workers:
        raise ValueError(f"{source}: server_hosts_clients = false: needs at least 2 ranks")


def _same_device(config: Config, comm: Comm, workers: Sequence[int], device: torch.device) -> Config:
    """The config with ``engine.device`` decided: the kind of device that all workers have."""
    with_gpu = np.zeros(comm.size, np.int64)
    with_gpu[comm.rank] = device.type == "cuda"
    comm.sum(with_gpu)
    if 0 < with_gpu.sum() < len(workers):
        without = [rank for rank in workers if not with_gpu[rank]]
        raise ValueError(f"engine.device = auto: ranks {without} have no GPU, the others do; set engine.device=cpu")
    return replace(config, engine=replace(config.engine, device="cuda" if with_gpu.any() else "cpu"))


def _build(config: Config, source: str, comm: Comm, workers: Sequence[int], device: torch.device) -> Built:
    data = load_data(config, source)
    model = load_model(config, source, data)
    split = split_data(config, source, data)
    config = decided(config, model, config.engine.device)
    shape = tuple(data.train.x.shape[1:])
    feed = None  # a server that hosts nobody keeps no images
    if comm.rank in workers:
        with naming(source, "data"):
            feed = Feed(data, split, seed=config.seed, shift=config.data.source.shift, device=device, augment=True)
    algorithm, sizes = config.algorithm, [len(indices) for indices in split.train]
    trainer = Trainer(algorithm, model.to(device), config.train, feed, device, config.engine.path == "stack")
    together_ = groups(sizes, config.engine.group_size)
    host = assign([sum(sizes[c] for c in group) for group in together_], workers)
    rank_of = {c: rank for group, rank in zip(together_, host) for c in group}
    first = algorithm.init(model, rng(config.seed, "init"))
    if both := first.shared.keys() & first.personal.keys():
        raise ValueError(f"{source}: model: the network has a leaf {min(both)}, a name that the algorithm keeps for its own")
    run = Run(
        algorithm=algorithm,
        trainer=trainer,
        comm=comm,
        groups=together_,
        host=host,
        weight_N=tuple(sizes if algorithm.weights == "samples" else [1] * len(sizes)),
        seed=config.seed,
        participation=config.participation,
        reduce=config.reduce,
        upload=Layout.of(algorithm.upload(first, first)),
        mixing=Mixing.of(algorithm, first, [rank_of[c] for c in range(len(sizes))], workers, config.mix),
    )
    return Built(config, run, split, shape, first, f"{configs.digest(config)}-{split.digest()[:16]}")
