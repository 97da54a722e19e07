"""Reads a config file into ``Config``.

A YAML file may have one base file, whose keys it overrides. ``key=value`` arguments of the command
line override both.

Only plain data under YAML 1.2's core rules is read. ``1e-3`` is a number; ``on``, ``yes``, ``010``,
``1:30`` and ``2020-01-01`` are text. A duplicate key, a tag, an anchor or an alias is refused.
Every mistake is a ``ConfigError`` of one line.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import yaml

from .. import algorithms
from ..aggregation.topology import TOPOLOGIES, Topology, topology_name
from ..algorithm import Algorithm, dataclass_mistake
from ..components.decentralised import over_topology
from ..core.escapes import safe_file_name
from ..core.losses import CROSS_ENTROPY, LOSSES
from ..core.packaged import find_config, packaged_configs
from ..data.datasets import DATASETS, Source
from ..data.partition import PARTITIONS, Partition
from ..data.tables import Table
from ..models import zoo
from ..models.network import Model
from ..privacy.settings import Privacy
from ..store.files import text_checksum
from . import blocks, former
from .blocks import ConfigError, Field, Origin, reset_lines
from .experiment import Config, DataBlock, Faults, Log, ModelBlock, Network
from .method_settings import method_settings

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
    "engine": ("compile", "personal", "graphs"),
    "evaluate": ("clients", "metrics"),
    "faults": tuple(blocks.config_fields(Faults)),
    "log": tuple(blocks.config_fields(Log)),
}
COMMAND_LINE = "command line"
# Overrides that are paths; those of the second tuple may also be null.
_PATH_KEYS = (
    "output",
    "data.root",
    "data.text.train",
    "data.text.test",
    "data.table.train",
    "data.table.test",
    "model.folder",
    "topology.path",
)
_NETWORK_KEYS = ("weights", "head", "output")  # of every network, beside its own options
_NULLABLE_PATH_KEYS = ("data.text.tokenizer", "data.path", "model.weights")
_CHECKSUM_PREFIX = "# Checksum of what follows: "
_RESET_PREFIX = "# Hint: "
_MAX_DEPTH = 20
_PLACEHOLDER = re.compile(r"\{(.*?)\}")


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (``find_config``) or of keys, overridden by ``key=value`` texts.

    Overrides may come in any order; if two have the same key, the later one counts. Raises
    ConfigError.
    """
    return _fill_output(Path(source_of(source)), *_read(source, overrides))


def source_of(config: str | Path | Mapping[str, Any]) -> str:
    """What messages name a config: its file, or ``config`` if it is keys."""
    return "config" if isinstance(config, Mapping) else str(find_config(config))


def output_pattern(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> str:
    """``output`` of ``read(source, overrides)``, before its placeholders are replaced.

    No other key is checked. Raises ConfigError if the file cannot be read.
    """
    tree = _merge(source, overrides).tree
    return str(tree.get("output", blocks.config_fields(Config)["output"].default))


def has_placeholder(text: str) -> bool:
    """Whether a value of ``output`` names a part that ``read`` replaces."""
    return bool(_PLACEHOLDER.search(text))


def _fill_output(path: Path, config: Config, origin: Origin) -> Config:
    """``config`` of the file ``path`` with the placeholders of ``output`` replaced."""
    names = {
        "name": path.stem,
        "algorithm": algorithm_name(config.algorithm).rpartition(":")[2],
        "seed": str(config.seed),
    }
    placeholders = _PLACEHOLDER.findall(config.output)
    if not set(placeholders) <= set(names):
        settings = dict(_flatten(_complete_tree(config)))
        del settings["output"]
        names = {key: safe_file_name(_plain_text(settings[key])) for key in settings} | names
    for placeholder in placeholders:
        if placeholder not in names:
            reason = (
                f"{{{placeholder}}} is unknown; there are {{name}}, {{algorithm}}, {{seed}} and "
                f"every key, such as {{train.lr}}{blocks.suggest(placeholder, names)}"
            )
            raise origin.error("output", reason, config.output)
    return replace(config, output=_PLACEHOLDER.sub(lambda m: names[m[1]], config.output))


def _complete_tree(config: Config) -> dict[str, Any]:
    """``resolved_dict(config)`` with the keys that it leaves out at their defaults."""
    tree, model = resolved_dict(config), config.model
    names = (*OMIT_IF_DEFAULT, "privacy")
    omitted = blocks.to_plain({name: getattr(config, name) for name in names})
    data, network_keys = blocks.to_plain(config.data), dict.fromkeys(_NETWORK_KEYS)
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


def _plain_text(value: Any) -> str:
    """A value as it would be written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _read(
    config_source: str | Path | Mapping[str, Any], overrides: Sequence[str], recorded: bool = False
) -> tuple[Config, Origin]:
    """The result of ``read`` before ``output`` is filled in, and where each key was written.

    recorded: whether the config is that of a run folder, see ``former.py``.
    """
    merged = _merge(config_source, overrides, recorded)
    origin = Origin(source_of(config_source), merged.sources)
    config = replace(_build_config(merged.tree, origin), resets=tuple(reset_lines(merged.resets)))
    return config, origin


def _merge(
    config_source: str | Path | Mapping[str, Any], overrides: Sequence[str], recorded: bool = False
) -> blocks.Merged:
    """The keys of a config, its base and the overrides as one tree."""
    path = Path(source_of(config_source))
    keys = {**config_source} if isinstance(config_source, Mapping) else _load_yaml(path)
    layers = [(former.add_missing_keys(keys) if recorded else keys, str(path))]
    if "base" in layers[0][0]:
        layers.insert(0, _load_base(layers[0][0].pop("base"), path))
    layers += [(layer, COMMAND_LINE) for layer in _parse_overrides(overrides)]
    return blocks.merge_layers(layers, CHOICES)


def annotated_yaml(path: str | Path, overrides: Sequence[str] = (), explain: bool = False) -> str:
    """Every key of ``read(path, overrides)`` as YAML with the origin as a comment:
    ``default``, ``FILE:LINE`` or ``command line``. Raises ConfigError.

    explain: whether comments above the settings of the method say what they mean.
    """
    path = find_config(path)
    config, origin = _read(path, overrides)
    sources = origin.source_of_key
    lines = {
        file: _key_lines(_read_text(Path(file))) for file in set(sources.values()) - {COMMAND_LINE}
    }
    config = _fill_output(path, config, origin)
    tree = _complete_tree(config)
    text = _to_yaml(tree)
    key_of_line = {line: key for key, line in _key_lines(text).items()}
    settings, annotated = dict(_flatten(tree)), []
    method = method_settings(type(config.algorithm)) if explain else []
    explained = {f"algorithm.{setting.name}": setting for setting in method if setting.meaning}
    for number, line in enumerate(text.splitlines(), 1):
        key = key_of_line.get(number)
        if key in explained:
            annotated += [f"  # {words}" for words in explained[key].explanation_lines()]
        if key in settings:
            line = f"{line:<48}  # {_place(key, sources, lines)}"
        annotated.append(line)
    return "\n".join(annotated) + "\n"


def _place(key: str, sources: Mapping[str, str], lines: Mapping[str, Mapping[str, int]]) -> str:
    """Where ``key`` is set: ``default``, ``command line``, or ``FILE:LINE``.

    lines: of each file, the number of each key's line.
    """
    selectors = [f"{block}.{choice.selectors[0]}" for block, choice in CHOICES.items()]
    written = next((k for k in _with_parents(key) if k in sources), "")
    # under a block that is a bare name, all keys but the name are defaults
    if not written or (written != key and key not in selectors):
        return "default"
    source = sources[written]
    # a bare name counts as its selector, which has no line of its own
    numbers = [n for k in _with_parents(key) if (n := lines.get(source, {}).get(k))]
    return f"{source}:{numbers[0]}" if numbers else source


def _with_parents(key: str) -> Iterator[str]:
    """``key``, and the blocks around it from inside out."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _key_lines(text: str) -> dict[str, int]:
    """{dotted key: number of its line, from 1} of a YAML text that has been read before."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from walk(value, f"{prefix}{key.value}.")

    return dict(walk(_Loader(text).get_single_node(), ""))


def from_dict(mapping: Mapping[str, Any], source: str) -> Config:
    """The config of a plain mapping such as the result of ``resolved_dict``.

    Messages name the mapping ``source``.
    """
    return _build_config(mapping, Origin(source))


def from_recorded(mapping: Mapping[str, Any], source: str) -> Config:
    """``from_dict`` of the resolved config of a run, which an earlier version may have written."""
    return from_dict(former.add_missing_keys(mapping), source)


def resolved_dict(config: Config) -> dict[str, Any]:
    """The keys as JSON-able data, in the order of the dataclass; ``from_dict`` reads it back.

    Some keys are left out where they have their defaults; ``_complete_tree`` has all.
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
    shared_keys = {name: getattr(network, name) for name in _NETWORK_KEYS}
    given_keys = {name: value for name, value in shared_keys.items() if value is not None}
    return {"name": network.name} | given_keys | blocks.to_plain(network.options)


def resolved_yaml(config: Config) -> str:
    """``resolved_dict`` as YAML; ``read`` returns an equal Config from it."""
    return _to_yaml(resolved_dict(config))


def _to_yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def checksummed_yaml(config: Config) -> str:
    """``resolved_yaml`` after a line with its checksum, for ``read_recorded``, and a line for each
    key that an override has reset.
    """
    text = "".join(f"{_RESET_PREFIX}{reset}\n" for reset in config.resets) + resolved_yaml(config)
    return f"{_CHECKSUM_PREFIX}{text_checksum(text)}\n{text}"


def read_recorded(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a run folder, whose ``output`` is a name, not a pattern.

    Raises ConfigError if the file has been changed since it was written.
    """
    first_line, _, yaml_text = _read_text(path).partition("\n")
    if first_line.startswith(_CHECKSUM_PREFIX) and first_line != _CHECKSUM_PREFIX + text_checksum(
        yaml_text
    ):
        raise ConfigError(
            f"{path}: checksum differs, the file was damaged or edited; give changes as "
            "KEY=VALUE, and remove its first line to take it as it is"
        )
    recorded = tuple(
        line.removeprefix(_RESET_PREFIX)
        for line in yaml_text.splitlines()
        if line.startswith(_RESET_PREFIX)
    )
    config = _read(path, overrides, recorded=True)[0]
    return replace(config, resets=recorded + config.resets)


def read_recorded_rounds(path: Path, overrides: Sequence[str] = ()) -> int:
    """``rounds`` of a config in a run folder, read without importing any code of the user.

    Only ``rounds=N`` may override it. Raises ConfigError.
    """
    pairs = [text.partition("=") for text in overrides]
    if other_keys := [key for key, _, _ in pairs if key != "rounds"]:
        raise ConfigError(
            f"{COMMAND_LINE}: {other_keys[0]}: of a run folder only rounds may be asked otherwise"
        )
    value = (
        _parse_yaml(pairs[-1][2], f"{COMMAND_LINE}: rounds")
        if pairs
        else _load_yaml(path).get("rounds")
    )
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: rounds = {value}: must be an integer of at least 1")
    return value


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
    """{dotted key: value} of every setting."""
    return dict(_flatten(resolved_dict(config)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def algorithm_name(algorithm: Algorithm) -> str:
    """The name of this algorithm in a config: ``fedlora``, or ``my_package.my_module:MyClass``."""
    cls = type(algorithm)
    package, _, name = cls.__module__.rpartition(".")
    return name if package == algorithms.__name__ else f"{cls.__module__}:{cls.__name__}"


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


def partition_kind(partition: Partition) -> str:
    """The name of this partition's rule in a config."""
    return next(kind for kind, cls in PARTITIONS.items() if type(partition) is cls)


# Building a Config from the merged keys.


def _build_config(tree: Mapping[str, Any], origin: Origin) -> Config:
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
    known_fields |= {name: network_fields[name] for name in _NETWORK_KEYS}
    values = blocks.read_block(known_fields, options, key, origin, owner=name)
    shared_values = {name: values.pop(name) for name in _NETWORK_KEYS}
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


# Configs and overrides of Python.


def parse_tree(config: str | Path | Mapping[str, Any]) -> str | dict[str, Any]:
    """The keys of a mapping or of a YAML text, which has a line break; else the name of a file.

    Raises ConfigError.
    """
    if isinstance(config, Mapping):
        return _plain(config, "config")
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            f"config = {config!r}: must be a YAML file, the name of a config, YAML text or a dict"
        )
    text = os.fspath(config)
    return _check_keys(_parse_yaml(text, "config"), "config") if "\n" in text else text


def tree_yaml(tree: Mapping[str, Any]) -> str:
    """YAML of the keys of a config, for a file in any folder."""
    base = {"base": str(Path(tree["base"]).absolute())} if "base" in tree else {}
    return yaml.dump({**tree, **base}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override_text(key: str, value: Any) -> str:
    """The ``key=value`` text of a value of Python. Raises ConfigError."""
    plain = _plain(value, key)
    text = yaml.dump(
        plain, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    value_text = text.removesuffix("\n").removesuffix("\n...")  # the end of a document
    return f"{key}={value_text}"


def _plain(value: Any, key: str) -> Any:
    """``value`` as YAML reads it: tuples are lists, paths texts. Raises ConfigError."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{key}: the key {name!r} must be a text")
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{key} = {value!r}: must be a number, a text, None, or a list or dict of these; name a "
        "class or a function '<module>:<name>'"
    )


# Reading files and the command line into one tree of keys.


def _load_base(name: Any, path: Path) -> tuple[dict, str]:
    """The layer of the base file that the file ``path`` names, and its source."""
    place_in_file = f"{path}: base = {name}"
    if not isinstance(name, str) or len(name) > 1000 or not (path.parent / name).is_file():
        raise ConfigError(
            f"{place_in_file}: must be a YAML file, its path relative to this file's folder"
        )
    layer = _load_yaml(path.parent / name)
    if "base" in layer:
        raise ConfigError(f"{place_in_file}: this base has a base itself; one level is allowed")
    return layer, str(path.parent / name)


def _parse_overrides(texts: Sequence[str]) -> list[dict]:
    """One layer for each override.

    Whole blocks and selectors come first, so that they drop no other override.
    """
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")) or key.count(".") > _MAX_DEPTH:
            raise ConfigError(
                f"{COMMAND_LINE}: {text}: must be key=value, for instance train.lr=0.1"
            )
        pairs.append((key, parse_override(key, value, f"{COMMAND_LINE}: {text}")))
    selectors = [f"{block}.{n}" for block, choice in CHOICES.items() for n in choice.selectors]
    pairs.sort(key=lambda pair: (pair[0].count("."), pair[0] not in selectors))
    return [_nest_keys(key.split("."), value) for key, value in pairs]


def parse_override(key: str, text: str, source: str) -> Any:
    """The value of an override: a path is taken literally unless it is quoted; the rest is YAML.

    Raises ConfigError if YAML would drop a comment.
    """
    quoted = text.lstrip()[:1] in ("'", '"')
    if not quoted and (
        key in _PATH_KEYS or key in _NULLABLE_PATH_KEYS and text not in ("", "~", "null")
    ):
        return text
    value = _parse_yaml(text, source)
    remaining = list(text)
    for token in yaml.scan(text):
        remaining[token.start_mark.index : token.end_mark.index] = " " * (
            token.end_mark.index - token.start_mark.index
        )
    if comment := "".join(remaining).strip():
        raise ConfigError(
            f"{source}: {comment} would be a comment; put the text in quotes within those of the "
            "shell"
        )
    return value


# Which keys of a block mean the same under two choices.


def _common_partition_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> Collection[str]:
    """What all partitions have: clients, train, test, seed, overlap."""
    return [f.name for f in fields(Partition)]


def _common_network_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> Collection[str]:
    """The loss; another network has other weights, and its options only share their names."""
    return ("loss",)


def _common_topology_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> Collection[str]:
    """None."""
    return ()


def _common_method_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> Collection[str]:
    """The fields that both methods have from the same class, for instance ``LowRank``."""
    try:
        classes = [algorithms.find_algorithm(selection["name"]) for selection in (old, new)]
    except (ValueError, TypeError):  # the name is refused later, with its place
        return ()
    if not all(map(is_dataclass, classes)):
        return ()
    owners = [
        {name: owner for owner in cls.__mro__ for name in vars(owner).get("__annotations__", ())}
        for cls in classes
    ]
    old_names, new_names = ({f.name for f in fields(cast(Any, cls))} for cls in classes)
    common = old_names & new_names
    return [name for name in common if owners[0][name] is owners[1][name]]


CHOICES = {
    "data.partition": blocks.Choice(("kind",), _common_partition_fields),
    "model": blocks.Choice(("name", "mix"), _common_network_fields),
    "algorithm": blocks.Choice(("name",), _common_method_fields),
    "topology": blocks.Choice(("name",), _common_topology_fields),
}


def _nest_keys(names: Sequence[str], value: Any) -> dict:
    return {names[0]: _nest_keys(names[1:], value) if names[1:] else value}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        is_name = path.name == str(path) and not path.suffix
        names = f"; the package has {', '.join(packaged_configs())}" if is_name else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{names}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no YAML: byte {error.start} is not UTF-8") from None


def _load_yaml(path: Path) -> dict[str, Any]:
    return _check_keys(_parse_yaml(_read_text(path), str(path)), str(path))


def _check_keys(tree: Any, source: str) -> dict[str, Any]:
    """``tree`` if it holds keys. Raises ConfigError."""
    if not isinstance(tree, dict):
        content = "the file is empty" if tree is None else f"here is {blocks.format_value(tree)}"
        raise ConfigError(f"{source}: must hold keys and values, such as 'rounds: 300'; {content}")
    return tree


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        assert mark is not None, error  # the loader reads a text
        raise ConfigError(
            f"{source}: line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{source}: is no YAML: character {error.position}: {error.reason}"
        ) from None
    except ValueError as error:  # a number with thousands of digits
        raise ConfigError(f"{source}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Reads plain data under YAML 1.2's core rules, without hexadecimal and octal numbers.

    Keys are text and unique.
    """

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent, index):
        event, problem = self.peek_event(), None
        if getattr(event, "tag", None) or getattr(event, "anchor", None):
            problem = "tags, anchors and aliases are not allowed"
        if self.depth > _MAX_DEPTH:
            problem = f"blocks and lists are nested more than {_MAX_DEPTH} deep"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        first_lines = {}
        for key, _ in node.value:
            problem = None
            if key.tag != "tag:yaml.org,2002:str":
                problem = "a key must be text"
            elif key.value in first_lines:
                problem = f"{key.value} is given twice, first in line {first_lines[key.value]}"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first_lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would read as another type."""

    def ignore_aliases(self, data):
        return True


_NUMBER = (
    r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
for _tag, _pattern, _first_characters in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]\d*)", list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
):
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$", re.ASCII), _first_characters
        )
