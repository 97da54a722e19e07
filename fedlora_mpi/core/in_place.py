"""Finds out whether a function has changed the trees that it was given."""

from typing import NamedTuple

import torch
from torch import Tensor

from .names import display_name
from .tree import Tree, numel

# Trees with more numbers are watched by torch's version counters alone, which do not see a write
# through ``.data`` or numpy.
_MAX_COPY_NUMEL = 2**24


class _LeafState(NamedTuple):
    """A leaf as it was; ``content``: a copy, or None."""

    value: Tensor
    version: int
    content: Tensor | None

    def is_unchanged(self) -> bool:
        """Whether nobody has written to the tensor since."""
        if self.value._version != self.version:
            return False
        if self.content is None:
            return True
        value = self.value.detach()
        return torch.equal(value.nan_to_num(), self.content.nan_to_num())


class TreeState(NamedTuple):
    """A tree, and its leaves as they were."""

    tree: Tree
    leaves: dict[str, _LeafState]

    @classmethod
    def of(cls, tree: Tree) -> "TreeState":
        """The present state of ``tree``."""
        is_small = numel(tree) <= _MAX_COPY_NUMEL
        return cls(
            tree,
            {
                n: _LeafState(v, v._version, v.detach().clone() if is_small else None)
                for n, v in tree.items()
            },
        )

    def describe_change(self) -> str:
        """What has been done to the tree or a leaf since, as the end of a sentence; "" if
        nothing.
        """
        for name, leaf in self.leaves.items():
            if not leaf.is_unchanged():
                return f"writes in place into {display_name(name)}"
        if self.tree.keys() != self.leaves.keys() or any(
            self.tree[name] is not leaf.value for name, leaf in self.leaves.items()
        ):
            changed = next(
                name
                for name in self.tree.keys() | self.leaves.keys()
                if name not in self.leaves or self.tree.get(name) is not self.leaves[name].value
            )
            return f"changes the entry {display_name(changed)} of a tree in place"
        return ""
