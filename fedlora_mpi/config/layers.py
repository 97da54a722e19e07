"""The keys of a config file, of its base and of the overrides, as one tree.

A YAML file may have one base file, whose keys it overrides. ``key=value`` arguments of the command
line override both. Configs and overrides of Python become the same trees and texts.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from .. import algorithms
from ..core.packaged import find_config
from ..data.partition import Partition
from . import blocks, former
from .blocks import ConfigError
from .yaml_text import MAX_DEPTH, Dumper, check_keys, load_yaml, parse_yaml

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
_NULLABLE_PATH_KEYS = ("data.text.tokenizer", "data.path", "model.weights", "model.adapter")


def source_of(config: str | Path | Mapping[str, Any]) -> str:
    """What messages name a config: its file, or ``config`` if it is keys."""
    return "config" if isinstance(config, Mapping) else str(find_config(config))


def merge_tree(
    config_source: str | Path | Mapping[str, Any], overrides: Sequence[str], recorded: bool = False
) -> blocks.Merged:
    """The keys of a config, its base and the overrides as one tree."""
    path = Path(source_of(config_source))
    keys = {**config_source} if isinstance(config_source, Mapping) else load_yaml(path)
    layers = [(former.add_missing_keys(keys) if recorded else keys, str(path))]
    if "base" in layers[0][0]:
        layers.insert(0, _load_base(layers[0][0].pop("base"), path))
    layers += [(layer, COMMAND_LINE) for layer in _parse_overrides(overrides)]
    return blocks.merge_layers(layers, CHOICES)


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
    return check_keys(parse_yaml(text, "config"), "config") if "\n" in text else text


def tree_yaml(tree: Mapping[str, Any]) -> str:
    """YAML of the keys of a config, for a file in any folder."""
    base = {"base": str(Path(tree["base"]).absolute())} if "base" in tree else {}
    return yaml.dump({**tree, **base}, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def override_text(key: str, value: Any) -> str:
    """The ``key=value`` text of a value of Python. Raises ConfigError."""
    plain = _plain(value, key)
    text = yaml.dump(
        plain, Dumper=Dumper, default_flow_style=True, width=math.inf, allow_unicode=True
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


def _load_base(name: Any, path: Path) -> tuple[dict, str]:
    """The layer of the base file that the file ``path`` names, and its source."""
    place_in_file = f"{path}: base = {name}"
    if not isinstance(name, str) or len(name) > 1000 or not (path.parent / name).is_file():
        raise ConfigError(
            f"{place_in_file}: must be a YAML file, its path relative to this file's folder"
        )
    layer = load_yaml(path.parent / name)
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
        if not equals or not all(key.split(".")) or key.count(".") > MAX_DEPTH:
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
    value = parse_yaml(text, source)
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
