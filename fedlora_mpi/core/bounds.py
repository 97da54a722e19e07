"""Checks the fields of a config's block against intervals."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def bounded(block: "DataclassInstance", **intervals: str) -> None:
    """Raise ValueError for the first field of the dataclass outside its interval.

    For example ``bounded(self, mu="[0, inf)", tau="(0, 1]")`` can raise "mu = -1.0: must be a
    number of at least 0". All items of a tuple must be inside.
    """
    types = {field.name: field.type for field in fields(block)}
    for field, interval in intervals.items():
        value = getattr(block, field)
        items = value if isinstance(value, tuple) else (value,)
        if not all(_is_inside(item, interval) for item in items):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{field} = {shown}: must be {describe_range(types[field], interval)}")


def _is_inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(", "))
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)


def describe_range(annotation: Any, interval: str) -> str:
    """The values in words that a field of this type takes, such as "an integer of at least 1"."""
    kinds = {int: "an integer", "int": "an integer"}
    kinds |= {tuple[int, ...]: "integers", tuple[float, ...]: "numbers"}
    return f"{kinds.get(annotation, 'a number')} {_describe_interval(interval)}"


def _describe_interval(interval: str) -> str:
    """The interval in words."""
    low, high = interval[1:-1].split(", ")
    opens, closes = interval[0] == "(", interval[-1] == ")"
    if high == "inf":
        return f"above {low}" if opens else f"of at least {low}"
    upper = f"below {high}" if closes else f"at most {high}"
    if opens:
        return f"above {low} and {upper}"
    return f"from {low} to {'below ' if closes else ''}{high}"
