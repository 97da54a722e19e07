"""YAML as configs have it: plain data under YAML 1.2's core rules.

``1e-3`` is a number; ``on``, ``yes``, ``010``, ``1:30`` and ``2020-01-01`` are text. A duplicate
key, a tag, an anchor or an alias is refused. Every mistake is a ``ConfigError`` of one line.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..core.packaged import packaged_configs
from . import blocks
from .blocks import ConfigError

MAX_DEPTH = 20


def key_lines(text: str) -> dict[str, int]:
    """{dotted key: number of its line, from 1} of a YAML text that has been read before."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from walk(value, f"{prefix}{key.value}.")

    return dict(walk(_Loader(text).get_single_node(), ""))


def to_yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        is_name = path.name == str(path) and not path.suffix
        names = f"; the package has {', '.join(packaged_configs())}" if is_name else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{names}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no YAML: byte {error.start} is not UTF-8") from None


def load_yaml(path: Path) -> dict[str, Any]:
    return check_keys(parse_yaml(read_text(path), str(path)), str(path))


def check_keys(tree: Any, source: str) -> dict[str, Any]:
    """``tree`` if it holds keys. Raises ConfigError."""
    if not isinstance(tree, dict):
        content = "the file is empty" if tree is None else f"here is {blocks.format_value(tree)}"
        raise ConfigError(f"{source}: must hold keys and values, such as 'rounds: 300'; {content}")
    return tree


def parse_yaml(text: str, source: str) -> Any:
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
        if self.depth > MAX_DEPTH:
            problem = f"blocks and lists are nested more than {MAX_DEPTH} deep"
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


class Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would read as another type."""

    def ignore_aliases(self, data):
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """A text of several lines stands on one line of the file, in double quotes."""
    style = '"' if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)


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
    for _yaml in (_Loader, Dumper):
        _yaml.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$", re.ASCII), _first_characters
        )
