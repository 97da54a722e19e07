"""Builds a ``Config`` from the merged keys."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from .. import algorithms
from ..aggregation.topology import TOPOLOGIES, Topology
from ..algorithm import Algorithm, dataclass_mistake
from ..components.decentralised import over_topology
from ..core.losses import CROSS_ENTROPY, LOSSES
from ..data.partition import PARTITIONS, Partition
from ..data.source import DATASETS, Source
from ..models import zoo
from ..models.network import Model
from . import blocks, former
from .blocks import Field, Origin
from .experiment import Config, DataBlock, ModelBlock, Network
from .writing import NETWORK_KEYS, algorithm_name


def method_for(config: Config, model: Model) -> Algorithm:
    """The algorithm of a config as it runs with ``model``: over a topology without its server.

    Raises ValueError, "name = ...", if it cannot run so.
    """
    if config.topology is None:
        return config.algorithm
    try:
        return over_topology(config.algorithm, model)
    except ValueError as error:
        raise ValueError(f"name = {algorithm_name(config.algorithm)}: {error}") from None


def build_config(tree: Mapping[str, Any], origin: Origin) -> Config:
    known_fields = blocks.config_fields(Config) | {
        "data": Field(_build_data),
        "model": Field(_build_model),
        "algorithm": Field(_build_algorithm),
        "topology": Field(_build_topology, None),
    }
    return blocks.construct(
        Config, blocks.read_block(known_fields, tree, "", origin, "the config"), "", origin
    )


def _build_data(value: Any, key: str, origin: Origin) -> DataBlock:
    extra_fields = {
        "partition": Field(_build_partition),
        "tasks": blocks.config_fields(DataBlock)["tasks"],
    }
    known_fields = blocks.config_fields(Source) | {"dataset": Field(_read_dataset)} | extra_fields
    values = blocks.read_block(known_fields, value, key, origin, key)
    extra_values = {name: values.pop(name) for name in extra_fields}
    return blocks.construct(
        DataBlock,
        {"source": blocks.construct(Source, values, key, origin)} | extra_values,
        key,
        origin,
    )


def _read_dataset(value: Any, key: str, origin: Origin) -> str:
    if isinstance(value, Mapping):
        raise origin.error(key, "must be a name or <module>:<function>, not a block", value)
    return blocks.split_choice("", DATASETS, "<module>:<function>", value, key, origin)[0]


def _build_partition(value: Any, key: str, origin: Origin) -> Partition:
    kind, options = blocks.split_choice("kind", PARTITIONS, "", value, key, origin)
    return blocks.build_block(PARTITIONS[kind], options, key, origin, owner=kind)


def _build_topology(value: Any, key: str, origin: Origin) -> Topology | None:
    if value is None:
        return None
    name, options = blocks.split_choice("name", TOPOLOGIES, "", value, key, origin)
    return blocks.build_block(TOPOLOGIES[name], options, key, origin, owner=name)


def _build_model(value: Any, key: str, origin: Origin) -> ModelBlock:
    if not (isinstance(value, Mapping) and "mix" in value):
        loss = CROSS_ENTROPY.name
        if isinstance(value, Mapping) and "loss" in value:
            loss = _read_loss(value["loss"], blocks.dotted_key(key, "loss"), origin)
            value = {name: v for name, v in value.items() if name != "loss"}
        return ModelBlock((_build_network(value, key, origin),), loss=loss)
    fields_of_mix = blocks.config_fields(ModelBlock)
    known_fields = fields_of_mix | {
        "mix": Field(_build_networks),
        "loss": fields_of_mix["loss"]._replace(read=_read_loss),
    }
    values = blocks.read_block(known_fields, value, key, origin, "a mix of networks")
    return blocks.construct(ModelBlock, values, key, origin)


def _read_loss(value: Any, key: str, origin: Origin) -> str:
    if isinstance(value, Mapping):
        raise origin.error(key, "must be a name or <module>:<function>, not a block", value)
    return blocks.split_choice("", LOSSES, "<module>:<function>", value, key, origin)[0]


def _build_networks(value: Any, key: str, origin: Origin) -> tuple[Network, ...]:
    if not isinstance(value, list | tuple):
        raise origin.error(
            key, "must be a list of networks, each a name or a block with a name", value
        )
    return tuple(
        _build_network(item, f"{key}[{number}]", origin) for number, item in enumerate(value)
    )


def _build_network(value: Any, key: str, origin: Origin) -> Network:
    name, options = blocks.split_choice(
        "name", zoo.BUILDERS, "torchvision:<model> or <module>:<callable>", value, key, origin
    )
    builder = zoo.BUILDERS.get(name)
    known_fields = (
        blocks.keyword_fields(builder)
        if builder
        else dict.fromkeys(options, Field(partial(blocks.check_type, Any)))
    )
    network_fields = blocks.config_fields(Network)
    known_fields |= {name: network_fields[name] for name in NETWORK_KEYS}
    values = blocks.read_block(known_fields, options, key, origin, owner=name)
    shared_values = {name: values.pop(name) for name in NETWORK_KEYS}
    return Network(name, MappingProxyType(values), **shared_values)


def _build_algorithm(value: Any, key: str, origin: Origin) -> Algorithm:
    name, options = blocks.split_choice(
        "name", algorithms.algorithm_names(), "<module>:<Class>", value, key, origin
    )
    try:
        cls = algorithms.find_algorithm(name)
    except ValueError as error:
        raise origin.refusal(key, error) from None
    if mistake := dataclass_mistake(cls):
        raise origin.error(blocks.dotted_key(key, "name"), mistake, name)
    return blocks.build_block(cls, former.rename_values(name, options), key, origin, owner=name)
