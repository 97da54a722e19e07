"""The layout of the single flat buffer: where each leaf of a tree is in a vector of D numbers."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Size, Tensor

from ..core.tree import Tree


@dataclass(frozen=True)
class Layout:
    """Leaf names, shapes and dtypes, in buffer order.

    A leaf of integers or bools travels as float32, because a mean of integers need not be an
    integer.
    """

    shapes: dict[str, Size]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of leaves that are not float32

    @classmethod
    def of(cls, tree: Tree) -> "Layout":
        """The layout of one client's ``tree``, in the tree's order."""
        dtypes = {
            n: v.dtype
            for n, v in tree.items()
            if v.is_floating_point() and v.dtype != torch.float32
        }
        return cls({n: v.shape for n, v in tree.items()}, dtypes)

    @cached_property
    def size(self) -> int:
        """D, the number of entries of the buffer."""
        return sum(s.numel() for s in self.shapes.values())

    @property
    def leaf_descriptions(self) -> dict[str, str]:
        """The shape of each leaf, and its dtype if not float32, such as "[3, 5] float64"."""
        dtype_names = {n: str(dtype).replace("torch.", " ") for n, dtype in self.dtypes.items()}
        return {n: f"{list(s)}{dtype_names.get(n, '')}" for n, s in self.shapes.items()}

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all leaves, each in its own dtype."""
        return sum(s.numel() * self._leaf_dtype(n).itemsize for n, s in self.shapes.items())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the vector: float64 if any leaf is, else float32."""
        return joint_dtype(self.dtypes.values())

    def pack(self, tree: Tree) -> Tensor:
        """Copy the leaves into one vector [D], float64 if any leaf of ``tree`` is, else float32."""
        parts = [tree[name].reshape(-1) for name in self.shapes]
        vector = torch.cat(parts) if parts else torch.zeros(0)
        is_half = vector.is_floating_point() and vector.dtype.itemsize < 4
        return vector.float() if is_half else vector

    def cast(self, tree: Tree) -> Tree:
        """The leaves of ``tree`` in the layout's dtypes, as they come out of a vector."""
        return {n: tree[n].to(self._leaf_dtype(n)) for n in self.shapes}

    def unpack(self, vector: Tensor) -> Tree:
        """The leaves of ``vector`` [D], each in its own dtype.

        A leaf of the vector's dtype is a view into the vector.
        """
        converted = {dtype: vector.to(dtype) for dtype in {*map(self._leaf_dtype, self.shapes)}}
        tree, offset = {}, 0
        for name, shape in self.shapes.items():
            tree[name] = converted[self._leaf_dtype(name)][offset : offset + shape.numel()].view(
                shape
            )
            offset += shape.numel()
        return tree

    def _leaf_dtype(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, torch.float32)

    def common_leaves(self, tree: Tree) -> list[str]:
        """The leaves that ``tree`` has with the same shape."""
        return [n for n, shape in self.shapes.items() if n in tree and tree[n].shape == shape]

    def leaf_slices(self, names: Iterable[str]) -> tuple[slice, ...]:
        """The positions of these leaves in the vector; adjacent leaves share one slice."""
        wanted, offset = set(names), 0
        slices: list[slice] = []
        for name, shape in self.shapes.items():
            if name in wanted and slices and slices[-1].stop == offset:
                slices[-1] = slice(slices[-1].start, offset + shape.numel())
            elif name in wanted:
                slices.append(slice(offset, offset + shape.numel()))
            offset += shape.numel()
        return tuple(slices)

    def digest(self) -> str:
        """A hex hash of names, shapes and dtypes.

        It must be equal on all ranks, or the sum has no meaning.
        """
        text = repr([(n, tuple(s), self._leaf_dtype(n)) for n, s in self.shapes.items()])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def joint_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype in which numbers of all these dtypes travel: float64 if any is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def estimate_nbytes(numbers: int, layouts: Iterable[Layout]) -> int:
    """The bytes of ``numbers`` numbers of these layouts.

    Each number has the mean width of the layouts' numbers, or that of float32 if they are empty.
    """
    layouts = list(layouts)
    size = sum(layout.size for layout in layouts)
    return numbers * sum(layout.nbytes for layout in layouts) // size if size else 4 * numbers
