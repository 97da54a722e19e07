"""What a run is made of, whatever its engine: data, networks, types of clients."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from .. import config as configs
from ..aggregation.flat_layout import Layout
from ..aggregation.topology import MixingMatrix, mixing_matrix
from ..algorithm import Algorithm, LocalTraining, Transport, Variables, check_trainable
from ..components.lora import FineTuning
from ..config import Config, Network
from ..config.blocks import prefix_errors
from ..core.losses import LOSSES, Loss, Targets, find_loss
from ..core.names import display_name
from ..core.seeds import rng
from ..data.datasets import Data, load
from ..data.feed import Feed
from ..data.packing import pack_texts
from ..data.partition import Split
from ..engine.client_streams import ClientStreams
from ..engine.compiled import StepCompiler, need_compiler
from ..engine.graphs import GraphCache
from ..engine.memory import MemoryBudget
from ..engine.metrics import check_metrics
from ..engine.settings import Engine
from ..engine.train import ClientFeed, Trainer
from ..engine.walk import tmap_vars
from ..federation.clients import ClientType
from ..models.network import Model
from ..models.recomputing import recompute_blocks
from ..models.zoo import build as build_model
from ..models.zoo import is_external
from ..store.sinks import import_tensorboard
from .method_trial import try_method


def load_data(config: Config, source: str) -> Data:
    """The data set of a config."""
    loss = load_loss(config, source)
    with prefix_errors(source, "data"):
        data = load(config.data.source, loss.targets)
        if config.data.tasks and data.targets != "classes":
            raise ValueError(
                f"tasks.classes = {config.data.tasks.classes}: needs a class of each sample, and "
                f"the targets are {data.targets}; leave data.tasks out"
            )
    return data


def load_loss(config: Config, source: str) -> Loss:
    """The loss of a config."""
    with prefix_errors(source, "model"):
        return find_loss(config.model.loss)


def tell_hints(data: Data, source: str) -> None:
    """Say on stderr what is odd about the files of a data set, a line each."""
    for hint in data.hints:
        print(f"hint: {source}: data.{hint.removeprefix('data.')}", file=sys.stderr, flush=True)


def load_models(
    config: Config, source: str, data: Data, values_up_to: float = math.inf
) -> tuple[Model, ...]:
    """The networks of a config, each checked against its algorithm. Networks of this package that
    have more than ``values_up_to`` bytes together have no values and need no memory.
    """
    if values_up_to < math.inf and not any(is_external(n.name) for n in config.model.mix):
        models = _build_models(config, source, data, shapes_alone=True)
        if sum(model.nbytes for model in models) > values_up_to:
            return models
    return _build_models(config, source, data, shapes_alone=False)


def _build_models(config: Config, source: str, data: Data, shapes_alone: bool) -> tuple[Model, ...]:
    models, builder_inputs = [], (data.classes, data.shape, config.seed, data.tokens, data.padding)
    loss = load_loss(config, source)
    with prefix_errors(source, "model"):
        loss = loss.for_data(data.targets, data.classes)
    with prefix_errors(source, "evaluate"):
        check_metrics(config.evaluate.metrics, data.targets, data.classes)
    with prefix_errors(source, "algorithm"):
        _check_targets(config, data)
    for network in config.model.mix:
        with prefix_errors(source, "model"):
            _check_frozen_weights(config.algorithm, network)
        if network.name == "hf" and data.vocabulary and not config.data.source.text.tokenizer:
            reason = "network hf reads the tokens of its own tokenizer; give it"
            raise ValueError(f"{source}: data.text.tokenizer = null: {reason}")
        with prefix_errors(source, "model"):
            model = build_model(
                network.name,
                network.options,
                *builder_inputs,
                positions=data.shape[0] if data.targets == "tokens" else 0,
                weights=network.weights,
                adapter=network.adapter,
                head=network.head,
                output=network.output,
                dtype=network.dtype,
                quantization=network.quantization,
                packed=config.data.source.language.packing,
                shapes_alone=shapes_alone,
            )
            models.append(replace(model, loss=loss))
        with prefix_errors(source, "algorithm"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ``training_hints`` shows them once
            config.algorithm.check(models[-1], config.train)
    return tuple(models)


def _check_targets(config: Config, data: Data) -> None:
    """Raise ValueError if the method needs what the data do not have, or shares a name of the log
    with a metric.
    """
    method, name = config.algorithm, configs.algorithm_name(config.algorithm)
    _check_method(config, data.targets)
    if both := {*config.evaluate.metrics} & {*method.metrics}:
        raise ValueError(
            f"name = {name}: logs {min(both)} itself; leave it out of evaluate.metrics"
        )


def _check_frozen_weights(method: Algorithm, network: Network) -> None:
    """Raise ValueError if the network has what only a low-rank part beside frozen weights uses."""
    for key in ("adapter", "quantization"):
        value = getattr(network, key)
        if value is not None and not isinstance(method, FineTuning):
            raise ValueError(
                f"{key} = {value}: {configs.algorithm_name(method)} trains no low-rank part beside "
                "frozen weights; leave it out, or choose a method such as fedit"
            )


def _check_method(config: Config, targets: Targets) -> None:
    """Raise ValueError if the method needs classes and the targets are none."""
    if config.algorithm.needs_class_labels and targets != "classes":
        name = configs.algorithm_name(config.algorithm)
        raise ValueError(
            f"name = {name}: needs a class of each sample, and model.loss = {config.model.loss} "
            f"has {targets} as targets; choose another method, docs/methods.md says which "
            "need classes"
        )


def check_loss(config: Config, source: str) -> None:
    """Raise ConfigError if the method does not go with the loss, as far as the config tells."""
    if loss := LOSSES.get(config.model.loss):  # a user's own takes any targets
        with prefix_errors(source, "algorithm"):
            _check_method(config, loss.targets or "classes")


def split_data(config: Config, source: str, data: Data) -> Split:
    """Who has which samples."""
    owners = {"owners": data.owners} if data.owners else {}
    partition = config.data.partition
    with prefix_errors(source, "data"):
        if partition.by_class and not data.has_classes:
            raise ValueError(
                f"partition.kind = {configs.partition_kind(partition)}: needs a class of each "
                f"sample, and the targets are {data.targets}; choose iid, quantity or given"
            )
        train_y, test_y = data.class_labels
        return partition.split(train_y, test_y, data.label_classes, **owners)


def make_samples(config: Config, data: Data, split: Split) -> tuple[Data, Split]:
    """The samples that a feed holds, and who has which: packed rows of texts if the config says so,
    else ``data`` and ``split`` themselves.
    """
    return pack_texts(data, split) if config.data.source.language.packing else (data, split)


class Parts(NamedTuple):
    """What a run is made of, whatever its engine."""

    data: Data
    models: tuple[Model, ...]
    split: Split
    sample_split: Split  # of the samples that a feed holds, see ``make_samples``
    feed: Feed | None  # a server that hosts nobody keeps no images
    # the kinds of clients: number of the network, the method
    variants: Sequence[tuple[int, Transport]]
    type_of_client: tuple[int, ...]  # of each client
    initial_variables: Sequence[Variables]  # of each kind
    device: torch.device
    method: Algorithm  # of the config, as it runs
    metrics: Sequence[str] = ()  # of an evaluation
    matrix: MixingMatrix | None = None  # of the topology, if there is one

    @property
    def has_values(self) -> bool:
        """Whether all networks have values, without which a run can be counted but not started."""
        return not any(model.is_without_values for model in self.models)

    def client_types(self, train: LocalTraining, engine: Engine) -> tuple[ClientType, ...]:
        """The kinds of clients as an engine trains them."""
        prefixes = (
            [f"kind-{number}/" for number in range(len(self.variants))]
            if len(self.variants) > 1
            else [""]
        )
        networks, stacked = [model.to(self.device) for model in self.models], engine.path == "stack"
        if engine.gradient_checkpointing:
            networks = [recompute_blocks(model) for model in networks]
        make_compiler = StepCompiler if engine.compile else lambda: None
        uses_graphs = self.device.type == "cuda" if engine.graphs == "auto" else engine.graphs
        make_graphs = (lambda: GraphCache(self.device)) if uses_graphs else lambda: None
        streams = None
        if engine.path == "streams":
            assert isinstance(engine.group_size, int), engine.group_size
            streams = ClientStreams(self.device, engine.group_size)
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
                    engine.convolutions,
                    MemoryBudget(changes_bits=stacked),
                    self.metrics,
                    streams,
                ),
                initial,
                prefix,
                network_number,
            )
            for (network_number, variant), initial, prefix in zip(
                self.variants, self.initial_variables, prefixes, strict=True
            )
        )


def make_parts(
    config: Config,
    source: str,
    hosts_clients: bool,
    device: torch.device,
    beat: Callable[[], None],
    values_up_to: float = math.inf,
) -> Parts:
    """``hosts_clients``: whether this rank trains clients; ``beat``: ``on_batch`` of ``Feed``;
    ``values_up_to``: see ``assembly.build``.
    """
    data = load_data(config, source)
    models = load_models(config, source, data, values_up_to)
    split = split_data(config, source, data)
    samples, sample_split = make_samples(config, data, split)
    feed = None
    if hosts_clients:
        with prefix_errors(source, "data"):
            feed = Feed(
                samples,
                sample_split,
                seed=config.seed,
                shift=config.data.source.shift,
                device=torch.device("meta") if models[0].is_without_values else device,
                augment=True,
                on_batch=beat,
            )
    _try_users_method(config, source, models)
    with prefix_errors(source, "algorithm"):
        method = configs.method_for(config, models[0])
        variants, kind_of = client_variants(config, method)
        initial_variables = _initial_variables(config, method, variants, models)
        for (number, transport), initial in zip(variants, initial_variables, strict=True):
            network = config.model.mix[number].name
            check_trainable(
                configs.algorithm_name(config.algorithm),
                transport.method,
                network,
                models[number],
                config.train,
                initial,
            )
    matrix = None
    if config.topology:
        with prefix_errors(source, "topology"):
            matrix = mixing_matrix(config.topology, config.data.partition.clients)
    with prefix_errors(source, "engine"):
        if config.engine.compile:
            need_compiler()
        if config.engine.gradient_checkpointing:
            for model in models:
                recompute_blocks(model)
    if config.log.tensorboard:
        with prefix_errors(source, "log"):
            import_tensorboard()
    return Parts(
        data,
        models,
        split,
        sample_split,
        feed,
        variants,
        kind_of,
        initial_variables,
        device,
        method,
        config.evaluate.metrics,
        matrix,
    )


def _try_users_method(config: Config, source: str, models: Sequence[Model]) -> None:
    """Raise ValueError for a mistake of a user's own method; what this package brings needs no
    trial.
    """
    name = configs.algorithm_name(config.algorithm)
    if is_external(name):
        with prefix_errors(source, "algorithm"):
            clients = config.data.partition.clients
            try_method(name, config.algorithm, models, config.train, clients, config.seed)


def client_variants(
    config: Config, method: Algorithm
) -> tuple[list[tuple[int, Transport]], tuple[int, ...]]:
    """The kinds of clients, (number of the network, the method as they have it), and the kind of
    each client, [N].
    """
    network_of = config.model.network_of_clients(clients := config.data.partition.clients)
    transports = [method.transport(client, clients) for client in range(clients)]
    variant_of_client = [
        (network, transport.method)
        for network, transport in zip(network_of, transports, strict=True)
    ]
    first_client = {
        variant: client for client, variant in reversed([*enumerate(variant_of_client)])
    }
    variants = sorted(dict.fromkeys(variant_of_client), key=lambda variant: variant[0])
    return (
        [(variant[0], transports[first_client[variant]]) for variant in variants],
        tuple(map(variants.index, variant_of_client)),
    )


def _initial_variables(
    config: Config,
    algorithm: Algorithm,
    variants: Sequence[tuple[int, Transport]],
    models: Sequence[Model],
) -> list[Variables]:
    """The variables before round 1 of each kind of clients; the shared ones are the method's with
    the first network.

    Raises ValueError when networks differ in what the algorithm shares or mixes.
    """
    name = configs.algorithm_name(config.algorithm)
    networks = [config.model.mix[network].name for network, _ in variants]

    def initialize(method, model):
        initial = method.init(model, rng(config.seed, "init"))
        # clients train float32 copies of parameters that are stored in fewer bits
        initial = tmap_vars(lambda v: v.float() if v.dtype == model.dtype else v, initial)
        # what the server and the checkpoints hold of a network without values: zeros
        return tmap_vars(lambda v: torch.zeros_like(v, device="cpu") if v.is_meta else v, initial)

    initial_variables = [
        Variables(
            initialize(algorithm, models[network]).shared,
            initialize(transport.method, models[network]).personal,
        )
        for network, transport in variants
    ]
    for initial in initial_variables:
        if clashing_leaves := initial.shared.keys() & initial.personal.keys():
            raise ValueError(
                f"name = {name}: has a leaf "
                f"{display_name(min(clashing_leaves))} of its own, and so has the network; rename "
                "that part of the network"
            )
    mixes = [algorithm.upload(first, first, 0).mix for first in initial_variables]
    if config.topology is None and any(offer and offer.over_topology for offer in mixes):
        raise ValueError(
            f"name = {name}: clients mix with their neighbours; say who these are, for instance "
            "topology=ring"
        )
    for verb, trees in (
        ("shares", [v.shared for v in initial_variables]),
        ("mixes", [o.rows if o else {} for o in mixes]),
    ):
        layouts = [Layout.of(tree).leaf_descriptions for tree in trees]
        for network, layout in zip(networks, layouts, strict=True):
            if layout != layouts[0]:
                leaf = next(n for n in layouts[0] | layout if layouts[0].get(n) != layout.get(n))
                shapes = " and ".join(
                    leaf_shapes.get(leaf, "none") for leaf_shapes in (layouts[0], layout)
                )
                raise ValueError(
                    f"name = {name}: {verb} {display_name(leaf)}, which networks {networks[0]} "
                    f"and {network} have in different shapes ({shapes}); for a mix of networks "
                    "choose a method that shares only what they have in common, such as pfedlora"
                )
    return [first._replace(shared=initial_variables[0].shared) for first in initial_variables]
