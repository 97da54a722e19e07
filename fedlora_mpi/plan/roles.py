"""What a method does with each leaf of a network, as a short table: its role, its low-rank part."""

import math
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from ..components.lowrank import join_first, matrix_shape, skipped_weights
from ..models.network import Leaf, Model

_MAX_ROWS = 24  # with more rows, leaves whose names differ in numbers share one


class _Row(NamedTuple):
    """What the table says of a leaf."""

    name: str
    leaf: Leaf
    role: str
    part: str  # its low-rank part, or why it has none


def head_line(model: Model, requested: str | None) -> tuple[str, str]:
    """The module that is the head, or those that hold its leaves. requested: ``model.head``."""
    leaves = [name for name, leaf in model.all_leaves.items() if leaf.role == "head"]
    owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in leaves))
    text = model.head or join_first(owners) or "none"
    text += ", found by a forward pass" if requested is None else ", named by model.head"
    if model.output is not None:
        text += f"; the logits are the field {model.output} of the output"
    return "head", text


def leaf_lines(
    model: Model, low_rank: Mapping[str, int], full: Collection[str]
) -> list[tuple[str, str]]:
    """A table of all leaves, frozen ones too: shape, role, and the low-rank part if the method has
    any. Leaves that differ in the numbers of their layers share a row if there are many.

    low_rank: {weight: rank}; full: roles that the method trains as they are.
    """
    groups = _group(_rows(model, low_rank, full))
    table = [("leaf", "shape", "role", "low-rank part")] + [
        (
            _joint_name(rows),
            _range_text(rows, lambda row: str(list(row.leaf.shape))),
            rows[0].role,
            _range_text(rows, lambda row: row.part),
        )
        for rows in groups
    ]
    columns = [*zip(*table, strict=True)][: 4 if low_rank else 3]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in zip(*columns, strict=True)
    ]
    return [("leaves" if number == 0 else "", line) for number, line in enumerate(lines)]


def _rows(model: Model, low_rank: Mapping[str, int], full: Collection[str]) -> list[_Row]:
    reasons = skipped_weights(model, low_rank, full)
    rows = []
    for name, leaf in model.all_leaves.items():
        part = f"no: {reasons[name]}" if name in reasons else "no"
        decomposed = [n for n in (name, *model.slices(name)) if n in low_rank]
        if decomposed:
            part = f"rank {low_rank[decomposed[0]]} of {_shape_text(model.leaf(decomposed[0]))}"
        if decomposed and decomposed[0] != name:
            part += " in " + ", ".join(n.rpartition(":")[2] for n in decomposed)
        frozen = ", frozen" if name in model.frozen_leaves else ""
        rows.append(_Row(name, leaf, leaf.role + frozen, part))
    return rows


def _shape_text(leaf: Leaf) -> str:
    """The sides of the matrix that a weight is read as."""
    return "x".join(map(str, matrix_shape(leaf)))


def _group(rows: Sequence[_Row]) -> list[list[_Row]]:
    """The rows of the table, each with its leaves: as few leaves in one as _MAX_ROWS allows."""
    keys: tuple[Callable[[_Row], Hashable], ...] = (
        lambda row: row.name,
        lambda row: (_pattern(row.name), row.leaf.shape, row.role, row.part),
        lambda row: (_pattern(row.name), row.role, row.part.partition(" ")[0]),
        lambda row: (re.sub(r"\d+", "*", row.name), row.role, row.part.partition(" ")[0]),
    )
    groups: dict[Hashable, list[_Row]] = {}
    for key in keys:
        groups = {}
        for row in rows:
            groups.setdefault(key(row), []).append(row)
        if len(groups) <= _MAX_ROWS:
            break
    return list(groups.values())


def _pattern(name: str) -> str:
    """The name of a leaf with * in place of the numbers of layers."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name)


def _joint_name(rows: Sequence[_Row]) -> str:
    """The name of the leaves of a row, with * for what differs, and their number."""
    if len(rows) == 1:
        return rows[0].name
    parts = zip(*(re.split(r"(\d+)", row.name) for row in rows), strict=True)
    return "".join(p[0] if len({*p}) == 1 else "*" for p in parts) + f" ({len(rows)} leaves)"


def _range_text(rows: Sequence[_Row], text: Callable[[_Row], str]) -> str:
    """The text of the smallest leaf and that of the largest one, or one text if they are equal."""
    by_size = sorted(rows, key=lambda row: math.prod(row.leaf.shape))
    return " to ".join(dict.fromkeys((text(by_size[0]), text(by_size[-1]))))
