"""Writes a ``Config`` as keys, as YAML and as a digest."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import algorithms
from ..aggregation.topology import topology_name
from ..algorithm import Algorithm
from ..core.losses import CROSS_ENTROPY
from ..data.language import Language
from ..data.partition import PARTITIONS, Partition
from ..data.tables import Table
from ..privacy.settings import Privacy
from ..store.files import text_checksum
from . import blocks, former
from .experiment import Config, Faults, Log, ModelBlock, Network
from .yaml_text import to_yaml

FREE_ON_RESUME = (
    "rounds",
    "output",
    "checkpoint",
    "data.root",
    "data.path",
    "data.download",
    "topology.path",
    "server_hosts_clients",
    "mix",
    "uplink",
    "faults.tolerate",
    "faults.timeout",
    "engine.personal",
    "engine.graphs",
    "log",
)
# Keys (of a block, or all keys of it) that are written only if they differ from the default. So
# the digest of a config without them is the same as before these keys existed.
OMIT_IF_DEFAULT = {
    "engine": ("compile", "personal", "graphs", "convolutions", "gradient_checkpointing"),
    "evaluate": ("clients", "metrics"),
    "faults": tuple(blocks.config_fields(Faults)),
    "log": tuple(blocks.config_fields(Log)),
}
# of every network, beside its own options
NETWORK_KEYS = ("weights", "adapter", "head", "output", "dtype", "quantization")
CHECKSUM_PREFIX = "# Checksum of what follows: "
RESET_PREFIX = "# Hint: "


def complete_tree(config: Config) -> dict[str, Any]:
    """``resolved_dict(config)`` with the keys that it leaves out at their defaults."""
    tree, model = resolved_dict(config), config.model
    names = (*OMIT_IF_DEFAULT, "privacy")
    omitted = blocks.to_plain({name: getattr(config, name) for name in names})
    data, network_keys = blocks.to_plain(config.data), dict.fromkeys(NETWORK_KEYS)
    partition = {"partition": tree["data"]["partition"]}
    omitted["data"] = data["source"] | {"tasks": data["tasks"]} | partition
    if "mix" in tree["model"]:
        networks = [{"name": n["name"]} | network_keys | n for n in tree["model"]["mix"]]
        client_keys = {"clients": model.clients, "each": model.each}
        omitted["model"] = {"mix": networks, **blocks.to_plain(client_keys), "loss": model.loss}
    else:
        name = {"name": tree["model"]["name"]}
        omitted["model"] = name | network_keys | tree["model"] | {"loss": model.loss}
    tree = {"topology": None} | tree
    return {key: (tree | omitted)[key] for key in blocks.config_fields(Config)}


def resolved_dict(config: Config) -> dict[str, Any]:
    """The keys as JSON-able data, in the order of the dataclass; ``from_dict`` reads it back.

    Some keys are left out where they have their defaults; ``complete_tree`` has all.
    """
    tree = blocks.to_plain({name: getattr(config, name) for name in blocks.config_fields(Config)})
    partition = config.data.partition
    tree["data"] = blocks.to_plain(config.data.source) | {
        "partition": {"kind": partition_kind(partition)} | blocks.to_plain(partition)
    }
    # these defaults are not written, so that digests stay the same as before the keys existed
    for block, names in OMIT_IF_DEFAULT.items():
        _drop_defaults(tree, block, names)
    if config.data.tasks:
        tree["data"]["tasks"] = blocks.to_plain(config.data.tasks)
    if not config.data.source.allow_pickle:
        del tree["data"]["allow_pickle"]
    if config.data.source.path is None:
        del tree["data"]["path"]
    if config.data.source.table == Table():
        del tree["data"]["table"]
    if config.data.source.language == Language():
        del tree["data"]["language"]
    elif not config.data.source.language.packing:
        del tree["data"]["language"]["packing"]
    if config.privacy == Privacy():
        del tree["privacy"]
    if config.topology is None:
        del tree["topology"]
    else:
        tree["topology"] = {"name": topology_name(config.topology)} | tree["topology"]
    if config.data.source.text.tokenizer is None:
        del tree["data"]["text"]["tokenizer"]
    tree["model"] = _model_tree(config.model)
    tree["algorithm"] = {"name": algorithm_name(config.algorithm)} | blocks.to_plain(
        config.algorithm
    )
    return tree


def _drop_defaults(tree: dict[str, Any], block: str, names: Sequence[str]) -> None:
    """Remove those of ``names`` from a block that have their default, and then an empty block."""
    default = blocks.to_plain(Config.__dataclass_fields__[block].default)
    for name in names:
        if tree[block][name] == default[name]:
            del tree[block][name]
    if not tree[block]:
        del tree[block]


def _model_tree(model: ModelBlock) -> dict[str, Any]:
    networks = [_network_tree(network) for network in model.mix]
    optional = {"clients": model.clients, "each": model.each}
    client_keys = {name: list(value) for name, value in optional.items() if value is not None}
    loss_key = {} if model.loss == CROSS_ENTROPY.name else {"loss": model.loss}
    if len(networks) == 1 and not client_keys:
        return networks[0] | loss_key
    return {"mix": networks} | client_keys | loss_key


def _network_tree(network: Network) -> dict[str, Any]:
    shared_keys = {name: getattr(network, name) for name in NETWORK_KEYS}
    given_keys = {name: value for name, value in shared_keys.items() if value is not None}
    return {"name": network.name} | given_keys | blocks.to_plain(network.options)


def resolved_yaml(config: Config) -> str:
    """``resolved_dict`` as YAML; ``read`` returns an equal Config from it."""
    return to_yaml(resolved_dict(config))


def checksummed_yaml(config: Config) -> str:
    """``resolved_yaml`` after a line with its checksum, for ``read_recorded``, and a line for each
    key that an override has reset.
    """
    text = "".join(f"{RESET_PREFIX}{reset}\n" for reset in config.resets) + resolved_yaml(config)
    return f"{CHECKSUM_PREFIX}{text_checksum(text)}\n{text}"


def digest(config: Config) -> str:
    """32 hexadecimal digits, equal for two configs that differ at most in FREE_ON_RESUME."""
    tree = resolved_dict(config)
    tree["algorithm"] = former.restore_former_block(tree["algorithm"])
    for key in FREE_ON_RESUME:
        block, _, name = key.rpartition(".")
        (tree.get(block, {}) if block else tree).pop(name, None)
    if not tree.get("faults", True):
        del tree["faults"]
    return text_checksum(json.dumps(tree, sort_keys=True))


def flatten(config: Config) -> dict[str, Any]:
    """{dotted key: value} of ``resolved_dict``."""
    return dict(flatten_tree(resolved_dict(config)))


def all_settings(config: Config) -> dict[str, Any]:
    """{dotted key: value} of ``complete_tree``."""
    return dict(flatten_tree(complete_tree(config)))


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_tree(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def algorithm_name(algorithm: Algorithm) -> str:
    """The name of this algorithm in a config: ``fedlora``, or ``my_package.my_module:MyClass``."""
    cls = type(algorithm)
    package, _, name = cls.__module__.rpartition(".")
    return name if package == algorithms.__name__ else f"{cls.__module__}:{cls.__name__}"


def partition_kind(partition: Partition) -> str:
    """The name of this partition's rule in a config."""
    return next(kind for kind, cls in PARTITIONS.items() if type(partition) is cls)
