"""Reads a config file, or the config in a run folder, into ``Config``.

Every mistake is a ``ConfigError`` of one line.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.escapes import safe_file_name
from ..core.packaged import find_config
from ..store.files import text_checksum
from . import blocks, former
from .blocks import ConfigError, Origin, reset_lines
from .building import build_config
from .experiment import Config
from .layers import CHOICES, COMMAND_LINE, merge_tree, source_of
from .method_settings import method_settings
from .writing import (
    CHECKSUM_PREFIX,
    RESET_PREFIX,
    algorithm_name,
    all_settings,
    complete_tree,
    flatten_tree,
)
from .yaml_text import key_lines, load_yaml, parse_yaml, read_text, to_yaml

_PLACEHOLDER = re.compile(r"\{(.*?)\}")


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (``find_config``) or of keys, overridden by ``key=value`` texts.

    Overrides may come in any order; if two have the same key, the later one counts. Raises
    ConfigError.
    """
    return _fill_output(Path(source_of(source)), *_read(source, overrides))


def output_pattern(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> str:
    """``output`` of ``read(source, overrides)``, before its placeholders are replaced.

    No other key is checked. Raises ConfigError if the file cannot be read.
    """
    tree = merge_tree(source, overrides).tree
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
        settings = all_settings(config)
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


def _plain_text(value: Any) -> str:
    """A value as it would be written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _read(
    config_source: str | Path | Mapping[str, Any], overrides: Sequence[str], recorded: bool = False
) -> tuple[Config, Origin]:
    """The result of ``read`` before ``output`` is filled in, and where each key was written.

    recorded: whether the config is that of a run folder, see ``former.py``.
    """
    merged = merge_tree(config_source, overrides, recorded)
    origin = Origin(source_of(config_source), merged.sources)
    config = replace(build_config(merged.tree, origin), resets=tuple(reset_lines(merged.resets)))
    return config, origin


def annotated_yaml(path: str | Path, overrides: Sequence[str] = (), explain: bool = False) -> str:
    """Every key of ``read(path, overrides)`` as YAML with the origin as a comment:
    ``default``, ``FILE:LINE`` or ``command line``. Raises ConfigError.

    explain: whether comments above the settings of the method say what they mean.
    """
    path = find_config(path)
    config, origin = _read(path, overrides)
    sources = origin.source_of_key
    lines = {
        file: key_lines(read_text(Path(file))) for file in set(sources.values()) - {COMMAND_LINE}
    }
    config = _fill_output(path, config, origin)
    tree = complete_tree(config)
    text = to_yaml(tree)
    key_of_line = {line: key for key, line in key_lines(text).items()}
    settings, annotated = dict(flatten_tree(tree)), []
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


def from_dict(mapping: Mapping[str, Any], source: str) -> Config:
    """The config of a plain mapping such as the result of ``resolved_dict``.

    Messages name the mapping ``source``.
    """
    return build_config(mapping, Origin(source))


def from_recorded(mapping: Mapping[str, Any], source: str) -> Config:
    """``from_dict`` of the resolved config of a run, which an earlier version may have written."""
    return from_dict(former.add_missing_keys(mapping), source)


def read_recorded(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a run folder, whose ``output`` is a name, not a pattern.

    Raises ConfigError if the file has been changed since it was written.
    """
    first_line, _, yaml_text = read_text(path).partition("\n")
    if first_line.startswith(CHECKSUM_PREFIX) and first_line != CHECKSUM_PREFIX + text_checksum(
        yaml_text
    ):
        raise ConfigError(
            f"{path}: checksum differs, the file was damaged or edited; give changes as "
            "KEY=VALUE, and remove its first line to take it as it is"
        )
    recorded = tuple(
        line.removeprefix(RESET_PREFIX)
        for line in yaml_text.splitlines()
        if line.startswith(RESET_PREFIX)
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
        parse_yaml(pairs[-1][2], f"{COMMAND_LINE}: rounds")
        if pairs
        else load_yaml(path).get("rounds")
    )
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: rounds = {value}: must be an integer of at least 1")
    return value
