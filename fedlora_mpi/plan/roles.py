"""What a method does with each part of a network: the roles of leaves and the weights with a
low-rank part.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from ..components.lowrank import matrix_shape, skipped_weights
from ..models.network import Model

_MAX_FULL_NAMES = 16  # above this number of module names, the digits that count layers become *


def role_lines(model: Model) -> list[tuple[str, str]]:
    """(role, how many numbers in which modules) for each role that the network has."""
    lines = []
    for role in ("body", "head", "norm", "stats"):
        names = [name for name, leaf in model.leaves.items() if leaf.role == role]
        if names:
            numbers = sum(model.initial[name].numel() for name in names)
            lines.append((role, f"{numbers:,} numbers in {', '.join(_module_names(names))}"))
    return lines


def decomposition_lines(
    model: Model, low_rank: Mapping[str, int], full: Collection[str]
) -> list[tuple[str, str]]:
    """Lines on the weights with a low-rank part, with rank and matrix, and on the other weights of
    at least two dimensions, with the reason. full: roles that the method trains as they are.
    """
    if not low_rank:
        return []
    with_rank = [
        f"{name} {rank} of {_matrix_shape(model, name)}" for name, rank in low_rank.items()
    ]
    lines = [("low-rank", f"{len(with_rank)} weights, rank of matrix: {', '.join(with_rank)}")]
    without_rank = [
        f"{name} ({reason})" for name, reason in skipped_weights(model, low_rank, full).items()
    ]
    return lines + (
        [("no rank", f"{len(without_rank)} weights: {', '.join(without_rank)}")]
        if without_rank
        else []
    )


def _matrix_shape(model: Model, name: str) -> str:
    return "x".join(map(str, matrix_shape(model.leaves[name])))


def _module_names(names: Iterable[str]) -> list[str]:
    """The modules that own these leaves; a leaf of the network itself counts as its own module."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    short = [re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name) for name in modules]
    return list(dict.fromkeys(short)) if len(modules) > _MAX_FULL_NAMES else modules
