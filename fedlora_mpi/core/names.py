"""Names of leaves: those of a network, and those that a method adds, which no network can have.

The name of a network's leaf is its path, such as ``layer1.0.conv1.weight``: the names of modules
and of a parameter, joined by dots. torch refuses names that are empty or contain a dot. So no path
begins or ends with a dot or has two dots in a row. The names of a method's own leaves do:

    .last.conv1.weight   ``method_leaf_name("last", "conv1.weight")``: "last" of that leaf
    .fresh.              ``method_leaf_name("fresh")``: of no leaf, and the prefix of such names
    conv1.weight..A      ``factor_name("conv1.weight", "A")``: a part of a weight

A factor begins with a weight's path, the other two with a dot. In the files of a run the same
leaves have plain names, ``last.conv1.weight``, ``fresh`` and ``conv1.weight.A``, unless two leaves
would then share a name (``stored_names``).

Some weights hold the matrices of several products. ``in_proj_weight:q`` is the slice of
``in_proj_weight`` with the matrix q (``slice_name``), and ``in_proj_weight:q..A`` a factor of it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def method_leaf_name(prefix: str, leaf: str = "") -> str:
    """The name of a method's own leaf; without ``leaf`` also the prefix of all such names."""
    return f".{prefix}.{leaf}"


def is_method_leaf(leaf: str) -> bool:
    """Whether a leaf is a method's own, such as a factor, and not the network's."""
    return leaf.startswith(".") or ".." in leaf


def slice_name(weight: str, matrix: str) -> str:
    """The name of the slice of a weight that holds one of its matrices."""
    return f"{weight}:{matrix}"


def sliced_weight(name: str) -> str:
    """The name of the weight of which ``name`` is a slice."""
    return name.rpartition(":")[0]


def factor_name(weight: str, letter: str) -> str:
    """The name of a part of a weight: A or B of a low-rank part, W of a dense update."""
    return f"{weight}..{letter}"


def is_factor(leaf: str, letters: str = "AB") -> bool:
    """Whether a leaf is a part of a weight with one of ``letters``, by default a low-rank part."""
    return not leaf.startswith(".") and leaf[-3:-1] == ".." and leaf[-1] in letters


def weight_of(factor: str) -> str:
    """The name of the weight that a factor is a part of."""
    return factor[:-3]


def factors_by_weight(tree: Mapping[str, T], letter: str) -> dict[str, T]:
    """{weight: its part with this letter} of all such parts, in the tree's order."""
    return {weight_of(n): v for n, v in tree.items() if is_factor(n, letter)}


def display_name(leaf: str) -> str:
    """The name that a user reads.

    A network's path is unchanged. A method's own leaf becomes, for example, ``own.conv1.weight`` or
    ``conv1.weight.A``.
    """
    return leaf.strip(".").replace("..", ".")


def stored_names(leaves: Iterable[str]) -> dict[str, str]:
    """{leaf: its name in a file that holds ``leaves``}: the plain name, if it is unique.

    If two leaves would share it, the method's own leaf keeps its dots and the network's leaf its
    path.
    """
    leaves = list(leaves)
    name_counts = Counter(map(display_name, leaves))
    return {n: n if name_counts[display_name(n)] > 1 else display_name(n) for n in leaves}
