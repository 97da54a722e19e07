"""Builds a frozen dataclass from a mapping of plain values, with messages a user can act on.

An annotation says which values a field takes: int, float, bool, str, Literal, Any (plain data),
nested dataclasses, tuple[X, ...], and unions of these with None. A ``__post_init__`` raises
ValueError with a text that starts "field = value: "; the builder puts the file and the block in
front.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_IMPORT_PATH = re.compile(r"([^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*")  # dotted.module:attribute
_UNQUOTED = re.compile(r"(?!(true|false|null)$)[^\W\d]|[/~]")


class ConfigError(ValueError):
    """A mistake of the user in one line: its place, the key, the value, and what is allowed."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


def dotted_key(key: str, name: str) -> str:
    """The dotted key of ``name`` in the block ``key`` ("" is the whole config)."""
    return f"{key}.{name}" if key else name


def format_value(value: Any) -> str:
    """``value`` in at most 60 characters, as a user would write it.

    Text like 0.1 or true is in quotes.
    """
    is_unquoted = isinstance(value, str) and value.isprintable() and _UNQUOTED.match(value)
    text = value if is_unquoted else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def suggest(word: str, words: Collection[str]) -> str:
    """The end of a message: the valid word that the user probably meant, or nothing."""
    matches = get_close_matches(word, words, n=1)
    return f". Did you mean {matches[0]}?" if matches else ""


@dataclass(frozen=True)
class Origin:
    """Where each dotted key was written.

    A key that nobody wrote has the source of a key below it, else that of its block, else ``file``.
    """

    file: str
    source_of_key: Mapping[str, str] = field(default_factory=dict)

    def error(self, key: str, reason: str, value: Any = MISSING) -> ConfigError:
        """The error message about a key."""
        return self._message(
            key, key + ("" if value is MISSING else f" = {format_value(value)}") + f": {reason}"
        )

    def refusal(self, key: str, error: ValueError) -> ConfigError:
        """The error message for a ValueError that the constructor of the block ``key`` raised."""
        if match := re.match(r"([\w.]+) = ", str(error)):
            return self._message(dotted_key(key, match[1]), dotted_key(key, str(error)))
        return self._message(key, f"{key}: {error}" if key else str(error))

    def _message(self, key: str, text: str) -> ConfigError:
        while key and key not in self.source_of_key:
            sources_below = [
                source
                for written, source in self.source_of_key.items()
                if written.startswith(key + ".")
            ]
            if sources_below:
                return ConfigError(f"{sources_below[0]}: {text}")
            key = key.rpartition(".")[0]
        return ConfigError(f"{self.source_of_key.get(key, self.file)}: {text}")


NO_KEY = {"key": False}  # metadata of a field of a dataclass that is no key of its block


class Reset(NamedTuple):
    """A key that somebody wrote and that another choice has set back to its default."""

    key: str  # dotted
    value: Any  # as it was written
    source: str  # where
    choice: str  # "key = value" of the other choice
    choice_source: str


def reset_lines(resets: Iterable[Reset]) -> Iterator[str]:
    """A line for each choice, with all keys that it has reset."""
    keys: dict[str, list[str]] = {}
    for reset in resets:
        choice = f"{reset.choice} ({reset.choice_source})"
        key = f"{reset.key} = {format_value(reset.value)} ({reset.source})"
        keys.setdefault(choice, []).append(key)
    for choice, reset_keys in keys.items():
        yield f"{choice} resets {', '.join(reset_keys)}"


class Choice(NamedTuple):
    """A block whose other keys have their meaning from one or more of its keys, the selectors.

    kept: (old selection, new selection) -> the other keys that mean the same under both.
    """

    selectors: tuple[str, ...]  # a bare name is the value of the first
    kept: Callable[[Mapping[str, Any], Mapping[str, Any]], Collection[str]]


class Merged(NamedTuple):
    """Several layers as one tree."""

    tree: dict[str, Any]
    sources: dict[str, str]  # {dotted key: its source} for ``Origin``
    resets: tuple[Reset, ...]


Path = tuple[str, ...]


def merge_layers(
    layers: Iterable[tuple[Mapping[str, Any], str]], choices: Mapping[str, Choice]
) -> Merged:
    """The merged (layer, source) pairs; a later value replaces an earlier one.

    ``choices``: by the dotted keys of their blocks. A layer that names the same choice as before
    keeps the block's earlier keys. One that names another keeps those that mean the same, and
    resets the rest. One that gives a block as {} removes all its keys.
    """
    merged: dict[Path, tuple[Any, str]] = {}
    resets: list[Reset] = []
    for layer, source in layers:
        new = {path: (value, source) for path, value in _iter_leaves(layer)}
        for key, choice in choices.items():
            block = tuple(key.split("."))
            _name_selector(merged, new, (*block, choice.selectors[0]))
            merged, reset_paths, named = _select(merged, new, block, choice)
            resets += [
                Reset(".".join(path), *reset_paths[path], named, source) for path in reset_paths
            ]
        merged = {
            path: given
            for path, given in merged.items()
            if not any(_is_nested(path, new_path) for new_path in new)
        } | new
    tree: dict[str, Any] = {}
    for path, (value, _) in merged.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    sources = {".".join(path): source for path, (_, source) in merged.items()}
    last_resets = {reset.key: reset for reset in resets if reset.key not in sources}
    return Merged(tree, sources, tuple(last_resets.values()))


def _name_selector(
    merged: dict[Path, tuple[Any, str]], new: dict[Path, tuple[Any, str]], selector: Path
) -> None:
    """Write a block that one of the two gives as a bare name under its ``selector``, if the other
    gives keys in it.
    """
    block = selector[:-1]
    for given, other in ((merged, new), (new, merged)):
        is_bare_name = block in given and isinstance(given[block][0], str)
        if is_bare_name and any(
            len(path) > len(block) and _is_nested(block, path) for path in other
        ):
            given[selector] = given.pop(block)


def _select(
    merged: dict[Path, tuple[Any, str]],
    new: Mapping[Path, tuple[Any, str]],
    block: Path,
    choice: Choice,
) -> tuple[dict[Path, tuple[Any, str]], dict[Path, tuple[Any, str]], str]:
    """(what stays of ``merged``, what the choice of the layer ``new`` resets, that choice)."""
    old_selection, new_selection = (
        {n: leaves[(*block, n)][0] for n in choice.selectors if (*block, n) in leaves}
        for leaves in (merged, new)
    )
    if not (old_selection and new_selection) or old_selection == new_selection:
        return merged, {}, ""
    kept = choice.kept(old_selection, new_selection)
    selector, value = next(iter(new_selection.items()))
    named = f"{'.'.join((*block, selector))} = {format_value(value)}"
    in_block = {p: v for p, v in merged.items() if len(p) > len(block) and _is_nested(block, p)}
    removed = {path for path in in_block if path[len(block)] not in kept}
    resets = {
        p: in_block[p] for p in in_block if p in removed and p[len(block)] not in choice.selectors
    }
    return {p: v for p, v in merged.items() if p not in removed}, resets, named


Reader = Callable[[Any, str, Origin], Any]  # (value, dotted key, origin) -> the checked value


class Field(NamedTuple):
    """The reader of a key, and the value of the key when it is not given."""

    read: Reader
    default: Any = MISSING


def config_fields(cls: type) -> dict[str, Field]:
    """The keys of a dataclass."""
    hints = get_type_hints(cls)
    return {
        f.name: Field(
            partial(check_type, hints[f.name]),
            f.default if f.default_factory is MISSING else f.default_factory(),
        )
        for f in fields(cls)
        if f.metadata != NO_KEY
    }


def keyword_fields(function: Callable) -> dict[str, Field]:
    """The keyword-only parameters of a function; one without annotation takes any plain data."""
    hints = get_type_hints(function)
    return {
        p.name: Field(
            partial(check_type, hints.get(p.name, Any)),
            MISSING if p.default is p.empty else p.default,
        )
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def read_block(
    known_fields: Mapping[str, Field], block: Any, key: str, origin: Origin, owner: str
) -> dict[str, Any]:
    """The checked values of ``block`` for every known key, in their order, defaults included.

    Raises ConfigError if ``block`` is not a block, a key is unknown or missing, or a value has a
    wrong type.
    """
    names = ", ".join(known_fields) or "no fields"
    if not isinstance(block, Mapping):
        raise origin.error(key, f"must be a block with {names}", block)
    for name, value in block.items():
        if name not in known_fields:
            name = str(name)
            reason = f"{owner} has no such field; it has {names}{suggest(name, known_fields)}"
            raise origin.error(dotted_key(key, name), reason, value)
    values = {}
    for name, (reader, default) in known_fields.items():
        value = block.get(name, default)
        if value is MISSING:
            raise origin.error(dotted_key(key, name), "must be given")
        values[name] = reader(value, dotted_key(key, name), origin)
    return values


def construct(cls: type[T], values: Mapping[str, Any], key: str, origin: Origin) -> T:
    """``cls(**values)``; a ValueError of ``cls`` is reported under the block ``key``."""
    try:
        return cls(**values)
    except ValueError as error:
        raise origin.refusal(key, error) from None


def build_block(cls: type[T], block: Any, key: str, origin: Origin, owner: str = "") -> T:
    """The dataclass ``cls`` from ``block``; messages call it ``owner`` (default: the key)."""
    return construct(
        cls, read_block(config_fields(cls), block, key, origin, owner or key), key, origin
    )


def split_choice(
    selector: str, names: Collection[str], external_form: str, value: Any, key: str, origin: Origin
) -> tuple[str, Mapping[str, Any]]:
    """Split a choice block, or a bare name, into (name, the other keys).

    ``external_form`` describes the names of a user's own objects, always of the form
    ``dotted.module:attribute``; "" allows none.
    """
    options: Mapping[str, Any] = {}
    if isinstance(value, Mapping):
        key, options = dotted_key(key, selector), {k: v for k, v in value.items() if k != selector}
        value = value.get(selector, MISSING)
    allowed = join_alternatives([*names, external_form] if external_form else [*names])
    if value is MISSING:
        raise origin.error(key, f"must be given: {allowed}")
    if not isinstance(value, str):
        raise origin.error(key, f"must be {allowed}", value)
    if value not in names and not (external_form and _IMPORT_PATH.fullmatch(value)):
        raise origin.error(key, f"must be {allowed}{suggest(value, names)}", value)
    return value, options


def check_type(annotation: Any, value: Any, key: str, origin: Origin) -> Any:
    """``value`` converted to the type ``annotation``. Raises ConfigError if that is impossible."""
    members = _union_members(annotation)
    converted = _convert(value, annotation)
    if converted is not MISSING:
        return converted
    dataclasses = [
        member for member in members if isinstance(member, type) and is_dataclass(member)
    ]
    if dataclasses and (isinstance(value, Mapping) or len(members) == 1):
        return build_block(dataclasses[0], value, key, origin)
    words = [
        word for member in members if get_origin(member) is Literal for word in get_args(member)
    ]
    hint = (
        suggest(value, [w for w in words if isinstance(w, str)]) if isinstance(value, str) else ""
    )
    raise origin.error(key, f"must be {join_alternatives(allowed_texts(annotation))}{hint}", value)


def to_plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries, and tuples as lists, at every depth."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(v) for name, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _iter_leaves(
    block: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in nested mappings except non-empty mappings."""
    for name, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from _iter_leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _is_nested(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether the two paths are equal or one leads to the other."""
    return a[: len(b)] == b[: len(a)]


def _union_members(annotation: Any) -> tuple:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _convert(value: Any, annotation: Any) -> Any:
    """``value`` converted to the type ``annotation``, or MISSING if it does not have this type."""
    type_origin, args = get_origin(annotation), get_args(annotation)
    if type_origin in (Union, UnionType):
        # the exact type comes first, so that 4 stays an int in float | int
        exact_first = sorted(args, key=lambda member: member is not type(value))
        return next(
            (v for member in exact_first if (v := _convert(value, member)) is not MISSING), MISSING
        )
    if type_origin is Literal:
        return value if any(type(value) is type(a) and value == a for a in args) else MISSING
    if type_origin is tuple and args[1:] == (...,):
        items = (
            [_convert(v, args[0]) for v in value] if isinstance(value, list | tuple) else [MISSING]
        )
        return MISSING if any(v is MISSING for v in items) else tuple(items)
    if annotation is float:
        # neither nan nor inf
        number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        return float(value) if number else MISSING
    if annotation is Any:
        return value if _is_plain(value) else MISSING
    assert isinstance(annotation, type), f"{annotation}: no rule for this annotation"
    return value if type(value) is annotation else MISSING  # the exact type: True is no int


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (NoneType, bool, int, str) or _convert(value, float) is not MISSING


def allowed_texts(annotation: Any) -> list[str]:
    """The values that a field of type ``annotation`` takes, in words."""
    type_origin, args = get_origin(annotation), get_args(annotation)
    if type_origin in (Union, UnionType):
        words = [word for member in args for word in allowed_texts(member)]
        return [w for w in dict.fromkeys(words) if w != "an integer" or "a number" not in words]
    if type_origin is Literal:
        return [format_value(a) for a in args]
    if type_origin is tuple:
        return [f"a list, each item {join_alternatives(allowed_texts(args[0]))}"]
    if is_dataclass(annotation):
        return [f"a block with {', '.join(f.name for f in fields(annotation))}"]
    simple = {
        int: "an integer",
        float: "a number",
        str: "text",
        NoneType: "null",
        Any: "plain finite data",
    }
    return ["true", "false"] if annotation is bool else [simple.get(annotation, str(annotation))]


def join_alternatives(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


@contextmanager
def prefix_errors(source: str, block: str = "") -> Iterator[None]:
    """Put the file and the block in front of a ValueError that begins "key = value"."""
    block = f"{block}." if block else ""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {block}{str(error).removeprefix(block)}") from error
