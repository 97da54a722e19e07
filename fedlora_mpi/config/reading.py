"""The config file: YAML, one base under it, ``key=value`` from the command line over it; to
``Config``.

Only plain data under YAML 1.2's core rules: ``1e-3`` is a number; ``on``, ``yes``, ``010``,
``1:30`` and ``2020-01-01`` are text; a key given twice, a tag, an anchor or an alias is refused.
Every mistake is a ``ConfigError`` of one line.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from .. import algorithms
from ..algorithm import Algorithm
from ..data.datasets import Source
from ..data.partition import PARTITIONS, Partition
from ..models import zoo
from ..privacy.settings import Privacy
from ..store.files import checksum
from . import blocks
from .blocks import ConfigError, Field, Origin
from .experiment import Config, DataBlock, Faults, Log, ModelBlock, Network

# The keys of a choice block that say what its other keys mean.
SELECTORS = {"data.partition": ("kind",), "model": ("name", "mix"), "algorithm": ("name",)}
FREE_ON_RESUME = (
    "rounds",
    "output",
    "checkpoint",
    "data.root",
    "data.download",
    "server_hosts_clients",
    "mix",
    "uplink",
    "faults.tolerate",
    "faults.timeout",
    "engine.personal",
    "engine.graphs",
    "log",
)
# Keys, or whole blocks (all of their keys), that are written where they are not as by default: the
# digest of a config without them stays what it was before there were any.
OMIT_IF_DEFAULT = {
    "engine": ("compile", "personal", "graphs"),
    "evaluate": ("clients",),
    "faults": tuple(blocks.fields_of(Faults)),
    "log": tuple(blocks.fields_of(Log)),
}
COMMAND_LINE = "command line"
# Overrides that are paths; of these the latter may be null.
_PATHS = ("output", "data.root", "data.text.train", "data.text.test", "model.folder")
_PATHS_OR_NULL = ("data.text.tokenizer", "model.weights")
_SEAL = "# Checksum of what follows: "
_DEPTH = 20
_PLACEHOLDER = re.compile(r"\{(.*?)\}")


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, with ``key=value`` overrides over it.

    Overrides may come in any order; of two for the same key the later counts. Raises ConfigError.
    """
    config, origin = _read(Path(path), overrides)
    parts = {
        "name": Path(path).stem,
        "algorithm": algorithm_name(config.algorithm).rpartition(":")[2],
        "seed": str(config.seed),
    }
    for placeholder in _PLACEHOLDER.findall(config.output):
        if placeholder not in parts:
            allowed = ", ".join(f"{{{part}}}" for part in parts)
            raise origin.error(
                "output", f"{{{placeholder}}} is unknown; there are {allowed}", config.output
            )
    return replace(config, output=_PLACEHOLDER.sub(lambda m: parts[m[1]], config.output))


def _read(path: Path, overrides: Sequence[str]) -> tuple[Config, Origin]:
    """``read``, with ``output`` as it is written, and where each key was written."""
    layers = [(_load(path), str(path))]
    if "base" in layers[0][0]:
        layers.insert(0, _base(layers[0][0].pop("base"), path))
    layers += [(layer, COMMAND_LINE) for layer in _overrides(overrides)]
    tree, of = blocks.overlay(layers, SELECTORS)
    origin = Origin(str(path), of)
    return _config(tree, origin), origin


def from_dict(mapping: Mapping[str, Any], source: str) -> Config:
    """The config of a plain mapping such as ``resolved_dict`` gives; ``source`` names it in
    messages.
    """
    return _config(mapping, Origin(source))


def resolved_dict(config: Config) -> dict[str, Any]:
    """Every key written out, JSON-able, in the order of the dataclass; ``from_dict`` takes it back."""
    tree = blocks.plain({name: getattr(config, name) for name in blocks.fields_of(Config)})
    partition = config.data.partition
    kind = next(kind for kind, cls in PARTITIONS.items() if type(partition) is cls)
    tree["data"] = blocks.plain(config.data.source) | {
        "partition": {"kind": kind} | blocks.plain(partition)
    }
    for block, names in OMIT_IF_DEFAULT.items():
        _drop_defaults(tree, block, names)
    if config.data.tasks:  # likewise
        tree["data"]["tasks"] = blocks.plain(config.data.tasks)
    if not config.data.source.allow_pickle:
        del tree["data"]["allow_pickle"]
    if config.privacy == Privacy():  # likewise
        del tree["privacy"]
    if config.data.source.text.tokenizer is None:  # and before a tokenizer could be given
        del tree["data"]["text"]["tokenizer"]
    tree["model"] = _model_tree(config.model)
    tree["algorithm"] = {"name": algorithm_name(config.algorithm)} | blocks.plain(config.algorithm)
    return tree


def _drop_defaults(tree: dict[str, Any], block: str, names: Sequence[str]) -> None:
    """Remove those of ``names`` from a block that are as by default, and the block when nothing is
    left.
    """
    default = blocks.plain(Config.__dataclass_fields__[block].default)
    for name in names:
        if tree[block][name] == default[name]:
            del tree[block][name]
    if not tree[block]:
        del tree[block]


def _model_tree(model: ModelBlock) -> dict[str, Any]:
    networks = [_network_tree(network) for network in model.mix]
    rest = {"clients": model.clients, "each": model.each}
    given = {name: list(value) for name, value in rest.items() if value is not None}
    return networks[0] if len(networks) == 1 and not given else {"mix": networks} | given


def _network_tree(network: Network) -> dict[str, Any]:
    given = {} if network.weights is None else {"weights": network.weights}
    return {"name": network.name} | given | blocks.plain(network.options)


def resolved_yaml(config: Config) -> str:
    """``resolved_dict`` as YAML; ``read`` gives an equal Config back."""
    return yaml.dump(
        resolved_dict(config), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True
    )


def sealed_yaml(config: Config) -> str:
    """``resolved_yaml`` under a line with its checksum, for ``recorded``."""
    text = resolved_yaml(config)
    return f"{_SEAL}{checksum(text)}\n{text}"


def recorded(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a run folder, whose ``output`` is a name, not a pattern.

    Raises ConfigError when the file has been changed since it was written.
    """
    first, _, rest = _text(path).partition("\n")
    if first.startswith(_SEAL) and first != _SEAL + checksum(rest):
        raise ConfigError(
            f"{path}: checksum differs, the file was damaged or edited; give changes as "
            "KEY=VALUE, and remove its first line to take it as it is"
        )
    return _read(path, overrides)[0]


def recorded_rounds(path: Path, overrides: Sequence[str] = ()) -> int:
    """``rounds`` of a config in a run folder, for which nothing of the user's is imported;
    ``rounds=N`` alone may override it. Raises ConfigError.
    """
    given = [text.partition("=") for text in overrides]
    if other := [key for key, _, _ in given if key != "rounds"]:
        raise ConfigError(
            f"{COMMAND_LINE}: {other[0]}: of a run folder only rounds may be asked otherwise"
        )
    value = _parse(given[-1][2], f"{COMMAND_LINE}: rounds") if given else _load(path).get("rounds")
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: rounds = {value}: must be an integer of at least 1")
    return value


def digest(config: Config) -> str:
    """32 hexadecimal digits that two configs share when they differ in FREE_ON_RESUME at most."""
    tree = resolved_dict(config)
    for key in FREE_ON_RESUME:
        block, _, name = key.rpartition(".")
        (tree.get(block, {}) if block else tree).pop(name, None)
    if not tree.get("faults", True):
        del tree["faults"]
    return checksum(json.dumps(tree, sort_keys=True))


def flat(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every setting."""
    return dict(_flat(resolved_dict(config)))


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def algorithm_name(algorithm: Algorithm) -> str:
    """The name that a config gives to this algorithm: ``fedlora``, or
    ``my_package.my_module:MyClass``.
    """
    cls = type(algorithm)
    package, _, name = cls.__module__.rpartition(".")
    return name if package == algorithms.__name__ else f"{cls.__module__}:{cls.__name__}"


# From the merged keys to a Config.


def _config(tree: Mapping[str, Any], origin: Origin) -> Config:
    known = blocks.fields_of(Config) | {
        "data": Field(_data),
        "model": Field(_model),
        "algorithm": Field(_algorithm),
    }
    return blocks.make(Config, blocks.read(known, tree, "", origin, "the config"), "", origin)


def _data(value: Any, key: str, origin: Origin) -> DataBlock:
    own = {"partition": Field(_partition), "tasks": blocks.fields_of(DataBlock)["tasks"]}
    values = blocks.read(blocks.fields_of(Source) | own, value, key, origin, key)
    rest = {name: values.pop(name) for name in own}
    return blocks.make(
        DataBlock, {"source": blocks.make(Source, values, key, origin)} | rest, key, origin
    )


def _partition(value: Any, key: str, origin: Origin) -> Partition:
    kind, options = blocks.choose("kind", PARTITIONS, "", value, key, origin)
    return blocks.build(PARTITIONS[kind], options, key, origin, owner=kind)


def _model(value: Any, key: str, origin: Origin) -> ModelBlock:
    if not (isinstance(value, Mapping) and "mix" in value):
        return ModelBlock((_network(value, key, origin),))
    known = {name: field for name, field in blocks.fields_of(ModelBlock).items() if name != "mix"}
    values = blocks.read({"mix": Field(_networks)} | known, value, key, origin, "a mix of networks")
    return blocks.make(ModelBlock, values, key, origin)


def _networks(value: Any, key: str, origin: Origin) -> tuple[Network, ...]:
    if not isinstance(value, list | tuple):
        raise origin.error(
            key, "must be a list of networks, each a name or a block with a name", value
        )
    return tuple(_network(item, f"{key}[{number}]", origin) for number, item in enumerate(value))


def _network(value: Any, key: str, origin: Origin) -> Network:
    name, options = blocks.choose(
        "name", zoo.BUILDERS, "torchvision:<model> or <module>:<callable>", value, key, origin
    )
    own = zoo.BUILDERS.get(name)
    known = (
        blocks.options_of(own) if own else dict.fromkeys(options, Field(partial(blocks.typed, Any)))
    )
    known["weights"] = blocks.fields_of(Network)["weights"]
    values = blocks.read(known, options, key, origin, owner=name)
    weights = values.pop("weights")
    return Network(name, MappingProxyType(values), weights)


def _algorithm(value: Any, key: str, origin: Origin) -> Algorithm:
    name, options = blocks.choose(
        "name", algorithms.algorithm_names(), "<module>:<Class>", value, key, origin
    )
    try:
        cls = algorithms.find_algorithm(name)
    except ValueError as error:
        raise origin.refusal(key, error) from None
    if not is_dataclass(cls):
        raise origin.error(blocks.inside(key, "name"), "must be a frozen dataclass", name)
    return blocks.build(cls, options, key, origin, owner=name)


# From files and the command line to one tree of keys.


def _base(name: Any, path: Path) -> tuple[dict, str]:
    """The layer under ``path`` and its source."""
    at = f"{path}: base = {name}"
    if not isinstance(name, str) or len(name) > 1000 or not (path.parent / name).is_file():
        raise ConfigError(f"{at}: must be a YAML file, its path relative to this file's folder")
    layer = _load(path.parent / name)
    if "base" in layer:
        raise ConfigError(f"{at}: this base has a base itself; one level is allowed")
    return layer, str(path.parent / name)


def _overrides(texts: Sequence[str]) -> list[dict]:
    """One layer each; whole blocks and selectors first, so that they drop no other override."""
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")) or key.count(".") > _DEPTH:
            raise ConfigError(
                f"{COMMAND_LINE}: {text}: must be key=value, for instance train.lr=0.1"
            )
        pairs.append((key, _value(key, value, f"{COMMAND_LINE}: {text}")))
    selectors = [f"{block}.{name}" for block, names in SELECTORS.items() for name in names]
    pairs.sort(key=lambda pair: (pair[0].count("."), pair[0] not in selectors))
    return [_nested(key.split("."), value) for key, value in pairs]


def _value(key: str, text: str, source: str) -> Any:
    """What an override sets: a path is taken letter by letter, unless it stands in quotes; the rest
    is YAML.

    Raises ConfigError where YAML would drop a comment.
    """
    quoted = text.lstrip()[:1] in ("'", '"')
    if not quoted and (key in _PATHS or key in _PATHS_OR_NULL and text not in ("", "~", "null")):
        return text
    value = _parse(text, source)
    kept = list(text)
    for token in yaml.scan(text):
        kept[token.start_mark.index : token.end_mark.index] = " " * (
            token.end_mark.index - token.start_mark.index
        )
    if dropped := "".join(kept).strip():
        raise ConfigError(
            f"{source}: {dropped} would be a comment; put the text in quotes within those of the "
            "shell"
        )
    return value


def _nested(names: Sequence[str], value: Any) -> dict:
    return {names[0]: _nested(names[1:], value) if names[1:] else value}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no YAML: byte {error.start} is not UTF-8") from None


def _load(path: Path) -> dict[str, Any]:
    tree = _parse(_text(path), str(path))
    if not isinstance(tree, dict):
        what = "the file is empty" if tree is None else f"here is {blocks.show(tree)}"
        raise ConfigError(f"{path}: must hold keys and values, such as 'rounds: 300'; {what}")
    return tree


def _parse(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        raise ConfigError(
            f"{source}: line {at.line + 1}, column {at.column + 1}: {error.problem}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{source}: is no YAML: character {error.position}: {error.reason}"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{source}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Plain data under YAML 1.2's core rules, minus hexadecimal and octal; keys are text and
    unique.
    """

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent, index):
        event, problem = self.peek_event(), None
        if getattr(event, "tag", None) or getattr(event, "anchor", None):
            problem = "tags, anchors and aliases are not allowed"
        if self.depth > _DEPTH:
            problem = f"blocks and lists are nested more than {_DEPTH} deep"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        first: dict[str, int] = {}
        for key, _ in node.value:
            problem = None
            if key.tag != "tag:yaml.org,2002:str":
                problem = "a key must be text"
            elif key.value in first:
                problem = f"{key.value} is given twice, first in line {first[key.value]}"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""

    def ignore_aliases(self, data):
        return True


_NUMBER = r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]\d*)", list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
):
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$", re.ASCII), _first
        )
