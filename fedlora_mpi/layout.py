"""The one flat buffer: where each leaf of a tree sits in a vector of D numbers."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Size, Tensor

from .tree import Tree


@dataclass(frozen=True)
class Layout:
    """Leaf names and shapes, in buffer order."""

    shapes: dict[str, Size]

    @classmethod
    def of(cls, tree: Tree) -> "Layout":
        """Layout of one client's ``tree``, in the tree's order."""
        return cls({n: v.shape for n, v in tree.items()})

    @cached_property
    def size(self) -> int:
        """D, numbers of the buffer."""
        return sum(s.numel() for s in self.shapes.values())

    def pack(self, tree: Tree) -> Tensor:
        """Copy the leaves into one vector [D]."""
        parts = [tree[name].reshape(-1) for name in self.shapes]
        return torch.cat(parts) if parts else torch.zeros(0)

    def unpack(self, vector: Tensor) -> Tree:
        """Views into ``vector`` [D]; no copy."""
        parts = vector.split([s.numel() for s in self.shapes.values()])
        return {n: p.view(s) for (n, s), p in zip(self.shapes.items(), parts)}

    def common(self, tree: Tree) -> list[str]:
        """The leaves that ``tree`` has in the same shape."""
        return [n for n, shape in self.shapes.items() if n in tree and tree[n].shape == shape]

    def places(self, names: Iterable[str]) -> tuple[slice, ...]:
        """Where these leaves are in the vector; neighbours are one slice."""
        wanted, found, at = set(names), [], 0
        for name, shape in self.shapes.items():
            if name in wanted and found and found[-1].stop == at:
                found[-1] = slice(found[-1].start, at + shape.numel())
            elif name in wanted:
                found.append(slice(at, at + shape.numel()))
            at += shape.numel()
        return tuple(found)

    def digest(self) -> str:
        """Hex hash of names and shapes: equal on all ranks, or the sum means nothing."""
        text = repr([(n, tuple(s)) for n, s in self.shapes.items()])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
