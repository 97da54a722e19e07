"""Arithmetic on trees: flat dictionaries from leaf name to tensor.

Axis letters used in every file: N clients of the experiment, C clients of one group (the stacked
axis), B examples of a mini-batch, D numbers in a flat buffer. A name that ends in ``_C`` or ``_N``
carries that axis in front; any other name belongs to one client.
"""

from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor

Tree = dict[str, Tensor]


def tmap(fn: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Apply ``fn`` leaf by leaf; all trees have the names of the first."""
    return {name: fn(*(t[name] for t in trees)) for name in trees[0]}


def split(tree: Tree, belongs: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Return (the leaves that belong, the others), each in the tree's order."""
    selected = {n: v for n, v in tree.items() if belongs(n)}
    return selected, {n: v for n, v in tree.items() if n not in selected}


def numel(tree: Tree) -> int:
    """How many numbers the tree holds."""
    return sum(v.numel() for v in tree.values())


def nbytes(tree: Tree) -> int:
    """How many bytes the tree's numbers take."""
    return sum(v.nbytes for v in tree.values())


def storage_key(value: Tensor) -> int:
    """Return a number that tensors have in common if they share a storage. It also works on the
    device meta, whose tensors have no memory.
    """
    storage = value.untyped_storage()
    return storage.data_ptr() or storage._cdata


def sq_dist(a: Tree, b: Tree, leaves: Iterable[str] | None = None) -> Tensor:
    """Squared Euclidean distance of two trees over ``leaves`` (default: those of ``a``), []."""
    squares = (((a[n] - b[n]) ** 2).sum() for n in (a if leaves is None else leaves))
    return cast(Tensor, sum(squares))  # there is at least one leaf


def add_prefix(tree: Tree, prefix: str) -> Tree:
    """The leaves, renamed to ``prefix`` + name."""
    return {prefix + n: v for n, v in tree.items()}


def select_prefix(tree: Tree, prefix: str) -> Tree:
    """The leaves whose names begin with ``prefix``, without it; undoes ``add_prefix``."""
    return {n.removeprefix(prefix): v for n, v in tree.items() if n.startswith(prefix)}
