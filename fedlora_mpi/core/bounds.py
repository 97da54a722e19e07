"""Checks the fields of a config's block against intervals."""

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def bounded(block: "DataclassInstance", **intervals: str) -> None:
    """Raise ValueError for the first field of the dataclass outside its interval.

    For example ``bounded(self, mu="[0, inf)", tau="(0, 1]")`` can raise "mu = -1.0: must be a
    number of at least 0".
    """
    types = {field.name: field.type for field in fields(block)}
    for field, interval in intervals.items():
        low, high = interval[1:-1].split(", ")
        value = getattr(block, field)
        above = value > float(low) if interval[0] == "(" else value >= float(low)
        below = value < float(high) if interval[-1] == ")" else value <= float(high)
        if not (above and below):
            kind = "an integer" if types[field] in (int, "int") else "a number"
            raise ValueError(
                f"{field} = {value}: must be {kind} {_describe_interval(interval, low, high)}"
            )


def _describe_interval(interval: str, low: str, high: str) -> str:
    """The interval in words."""
    opens, closes = interval[0] == "(", interval[-1] == ")"
    if high == "inf":
        return f"above {low}" if opens else f"of at least {low}"
    upper = f"below {high}" if closes else f"at most {high}"
    if opens:
        return f"above {low} and {upper}"
    return f"from {low} to {'below ' if closes else ''}{high}"
