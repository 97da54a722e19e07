"""The axes of a sweep, in Hydra's syntax: what stands behind ``key=`` on the command line.

``a,b,c`` and ``choice(a,b,c)`` are values; a comma within quotes, brackets or braces separates
nothing. ``range(start,stop,step)`` are numbers below ``stop``. ``interval(a,b)`` and
``tag(log, interval(a,b))``, for a search alone, are all numbers from a to b. Source: Hydra 1.3,
"Extended Override syntax" and "Optuna Sweeper plugin".
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from ..config import COMMAND_LINE, parse_override
from ..config.blocks import ConfigError

_FUNCTION = re.compile(r"\s*(choice|range|interval|tag)\((.*)\)\s*", re.DOTALL)
_DOTTED_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_MAX_VALUES = 10_000  # of a range


class Axis(NamedTuple):
    """A key with several values, each as the text of an override.

    is_range: the values are numbers at equal distances.
    """

    key: str
    values: tuple[str, ...]
    is_range: bool = False


class Interval(NamedTuple):
    """A key with any number from ``low`` to ``high``; an integer if both are integers."""

    key: str
    low: int | float
    high: int | float
    is_log: bool = False


def split_overrides(texts: Sequence[str]) -> tuple[list[str], list[Axis | Interval]]:
    """Return the overrides that have one value, and the axes, of ``key=value`` texts.

    ``output`` is no axis. Of two texts with the same key and one value each, the later counts.
    Raises ConfigError, also for a key that is there twice and has several values.
    """
    plain: dict[str, str] = {}
    axes: dict[str, Axis | Interval] = {}
    earlier: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        axis = parse_axis(key, value) if equals and key != "output" else None
        if key in earlier and (axis or key in axes):
            raise ConfigError(
                f"{COMMAND_LINE}: {key} is there twice, as {earlier[key]} and {value}; "
                "give all its values once"
            )
        earlier[key] = value
        plain.pop(key, None)
        if axis is None:
            plain[key] = text
        else:
            axes[key] = axis
    return [*plain.values()], [*axes.values()]


def parse_axis(key: str, text: str) -> Axis | Interval | None:
    """Return the axis that ``text`` describes; None if it is one value. Raises ConfigError."""
    place = f"{COMMAND_LINE}: {key}={text}"
    if not (match := _FUNCTION.fullmatch(text)):
        items = split_items(text)
        return _axis_of(key, items, place) if len(items) > 1 else None
    function, items = match[1], split_items(match[2])
    if function == "choice":
        return _axis_of(key, items, place)
    if function == "range":
        return Axis(key, tuple(_range_values(items, place)), is_range=True)
    if function == "tag":
        *tags, inner = items
        axis = parse_axis(key, inner)
        if tags != ["log"] or not isinstance(axis, Interval):
            raise ConfigError(f"{place}: must be tag(log, interval(a,b))")
        if axis.low <= 0:
            raise ConfigError(f"{place}: a logarithmic interval must begin above 0")
        return axis._replace(is_log=True)
    bounds = _arguments(items, ("start", "end"), place).values()
    low, high = (_number(bound, place) for bound in bounds)
    if not low < high:
        raise ConfigError(f"{place}: must be interval(a,b) with a below b")
    return Interval(key, low, high)


def split_items(text: str) -> list[str]:
    """Return the parts of ``text`` between its commas, without the blanks around them.

    A comma within quotes, brackets or braces, or within the parentheses of a function, is none. If
    one of these is not closed, the text is one part, which the reader of the config refuses.
    """
    items, start, open_brackets, quote = [], 0, [], ""
    before = ","  # the last character that is no blank
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[at - 1] != "\\" else quote
        elif character in "'\"" and before in f",[{{:({character}":  # '' is a quote within quotes
            quote = character
        elif character in "[{" or character == "(" and _begins_function(text[start:at]):
            open_brackets.append(_CLOSING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character == "," and not open_brackets:
            items.append(text[start:at].strip())
            start = at + 1
        before = before if character.isspace() else character
    if quote or open_brackets:
        return [text]
    return [*items, text[start:].strip()]


def single_value_hint(text: str) -> str:
    """Return why an override may have one value by mistake, and the way out; "" if it may not."""
    key, equals, value = text.partition("=")
    value = value.strip()
    if not equals or key == "output":
        return ""
    if not value:
        return "has no value"
    if (match := _DOTTED_RANGE.fullmatch(value)) and int(match[1]) <= int(match[2]):
        return f"is one text; write {key}='range({match[1]},{int(match[2]) + 1})'"
    if value[0] == "[" and value[-1] == "]":
        return f"is one value, a list; write {key}={value[1:-1].strip()}"
    if "," in value and _begins_function(value.partition("(")[0]) and value[-1] != ")":
        return "its parenthesis is not closed; add )"
    return ""


def _begins_function(text: str) -> bool:
    return text.strip() in ("choice", "range", "interval", "tag")


def _axis_of(key: str, items: Sequence[str], place: str) -> Axis:
    earlier: dict[str, str] = {}  # by the value that the config reads
    for at, item in enumerate(items):
        if not item:
            raise ConfigError(f"{place}: value {at + 1} is empty; '' is an empty text")
        if item in items[:at]:
            raise ConfigError(f"{place}: {item} is there twice")
        if _FUNCTION.fullmatch(item):
            raise ConfigError(f"{place}: {item} must stand alone")
        if (same := earlier.setdefault(_read_value(key, item), item)) != item:
            raise ConfigError(f"{place}: {same} and {item} are the same value")
    return Axis(key, tuple(items))


def _read_value(key: str, text: str) -> str:
    """Return what the config reads from ``text``, so that equal values are equal texts."""
    try:
        value = parse_override(key, text, COMMAND_LINE)
    except ConfigError:  # told with its run
        return text
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(float(value) if is_number else value)


def _range_values(items: Sequence[str], place: str) -> list[str]:
    """Return the numbers of a range as texts. Decimals, so that 3 * 0.1 is 0.3."""
    names = ("stop",) if len(items) == 1 and "=" not in items[0] else ("start", "stop", "step")
    given = {"start": "0", "step": "1"}
    given |= {name: text for name, text in _arguments(items, names, place).items() if text}
    try:
        start, stop, step = (Decimal(given.get(name, "")) for name in ("start", "stop", "step"))
        count = math.ceil((stop - start) / step)
    except (ArithmeticError, ValueError):
        raise ConfigError(f"{place}: must be range(stop) or range(start,stop,step)") from None
    if count <= 0:
        raise ConfigError(f"{place}: gives no value: the numbers end before stop = {stop}")
    if count > _MAX_VALUES:
        raise ConfigError(f"{place}: gives {count} values; must be at most {_MAX_VALUES}")
    values = [start + at * step for at in range(count)]
    has_fractions = any("." in text or "e" in text.lower() for text in given.values())
    return [repr(float(value)) if has_fractions else str(value) for value in values]


def _arguments(items: Sequence[str], names: Sequence[str], place: str) -> dict[str, str]:
    """Return the arguments of a function by name, ``a`` or ``name=a``; "" for one not given."""
    pairs = [item.partition("=") for item in items]
    given = {
        key.strip() if equals else name: value.strip() if equals else key
        for name, (key, equals, value) in zip(names, pairs, strict=False)
    }
    if not set(given) <= set(names) or len(items) > len(names):
        raise ConfigError(f"{place}: takes {', '.join(names)}")
    return dict.fromkeys(names, "") | given


def _number(text: str, place: str) -> int | float:
    """Return a number. Raises ConfigError."""
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{place}: {text!r} must be a number") from None
    if number - number != 0:
        raise ConfigError(f"{place}: {text} must be finite")
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else number
