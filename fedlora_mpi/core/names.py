"""Names of leaves: those of a network, and those that a method adds, which no network can have.

A network's leaf is called by its path, such as ``layer1.0.conv1.weight``: names of modules and of a
parameter, joined by dots. torch refuses a name that is empty or holds a dot, so no path begins or
ends with a dot or has two in a row, whatever the parts of a network are called. The own leaves of a
method do:

    .last.conv1.weight   ``method_leaf_name("last", "conv1.weight")``: "last" of that leaf
    .fresh.              ``method_leaf_name("fresh")``: of no leaf; such names begin the ones above
    conv1.weight..A      ``factor_name("conv1.weight", "A")``: a part of what a weight stands for

A first dot tells the first two from a factor, whose weight has a path. In the files of a run the
same leaves have plain names, ``last.conv1.weight``, ``fresh`` and ``conv1.weight.A``, but where two
leaves would then be called alike (``names_in_files``).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def method_leaf_name(prefix: str, leaf: str = "") -> str:
    """The name of a method's own leaf; without ``leaf`` also the prefix of all such names."""
    return f".{prefix}.{leaf}"


def is_method_leaf(leaf: str) -> bool:
    """Whether a leaf is a method's own, a factor or another, and so none of a network."""
    return leaf.startswith(".") or ".." in leaf


def factor_name(weight: str, letter: str) -> str:
    """The name of a part of a weight: A or B of a low-rank part, W of a dense update."""
    return f"{weight}..{letter}"


def is_factor(leaf: str, letters: str = "AB") -> bool:
    """Whether a leaf is such a part, by default of a low-rank one."""
    return not leaf.startswith(".") and leaf[-3:-1] == ".." and leaf[-1] in letters


def weight_of(factor: str) -> str:
    """The weight that a factor is a part of."""
    return factor[:-3]


def factors_by_weight(tree: Mapping[str, T], letter: str) -> dict[str, T]:
    """{weight: its part of this letter} of all that there are, in the tree's order."""
    return {weight_of(n): v for n, v in tree.items() if is_factor(n, letter)}


def display_name(leaf: str) -> str:
    """What a user reads: the path of a network's leaf as it is, ``own.conv1.weight`` or
    ``conv1.weight.A`` of others.
    """
    return leaf.strip(".").replace("..", ".")


def stored_names(leaves: Iterable[str]) -> dict[str, str]:
    """{leaf: its name in a file that holds ``leaves``}: the plain one, but of two leaves that would
    share it the one that is the method's own keeps its dots, and the network's its path.
    """
    leaves = list(leaves)
    name_counts = Counter(map(display_name, leaves))
    return {n: n if name_counts[display_name(n)] > 1 else display_name(n) for n in leaves}
