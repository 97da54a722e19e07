"""A small low-rank adapter that has the same shape beside networks of any shape.

  matrix  beside the head, W [classes, d]: y = W z + b + s B (A z), with the factors
          A [r, d], B [classes, r]
  conv    beside the first convolution, W [O, I, K1, K2] (or of one or three kernel sides):
          a convolution A [r, I, K1, K2] with r channels, then a 1x1 convolution B [O, r]
  alone   s B (A z) without the head: a low-rank classifier of the head's features z
  side    a network of its own from the input x to the features z of the head:
          z + s B (A x), A [r, numbers of x], B [d, r]

``matrix`` and ``conv`` are linear, so each equals adding s B A to W. Adding it to W makes the
sum of the head and an adapter that stands ``alone``.

A ~ U(-1, 1) / sqrt(inputs), as in torch's Linear (Kaiming with a = sqrt 5), and B = 0: an adapter
adds nothing before it has trained.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..core.bounds import bounded
from ..core.tree import Tree
from ..models.network import Model

AdapterPlace = Literal["matrix", "conv", "side", "alone"]


@dataclass(frozen=True)
class Adapter:
    """The place of an adapter, its rank r (``lora_rank``) and its scale s."""

    place: AdapterPlace = "matrix"
    lora_rank: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        bounded(self, lora_rank="[1, inf)", scale="(0, inf)")

    def weight_name(self, model: Model) -> str:
        """Return the weight that the adapter is beside.

        Raises ValueError if the network has none.
        """
        if self.place == "side" and model.tokens:
            raise ValueError(
                "adapter = side: needs images, not texts, whose numbers are names of words"
            )
        kind = "conv" if self.place == "conv" else "linear"
        candidates = [
            n
            for n, leaf in model.all_leaves.items()
            if leaf.matrix == kind and (kind == "conv" or leaf.role == "head")
        ]
        candidates = candidates if kind == "conv" or model.ends_in_linear else []
        if not candidates:
            needed_layer = "a convolution" if kind == "conv" else "a Linear at its end"
            raise ValueError(f"adapter = {self.place}: needs a network with {needed_layer}")
        return candidates[0]

    def init(self, model: Model, rng: Generator) -> Tree:
        """Return the initial factors {"A", "B"}."""
        out_size, *in_shape = model.all_leaves[self.weight_name(model)].shape
        if self.place == "side":
            out_size, in_shape = in_shape[0], [torch.Size(model.shape).numel()]
        width = torch.Size(in_shape).numel()
        A = (torch.rand(self.lora_rank, *in_shape, generator=rng) * 2 - 1) / width**0.5
        return {"A": A, "B": torch.zeros(out_size, self.lora_rank)}

    def merge(self, model: Model, tree: Tree, adapter: Tree) -> Tree:
        """Return ``tree`` with s B A added to the adapter's weight.

        A ``side`` adapter belongs to no weight, so ``tree`` is unchanged.
        """
        if self.place == "side":
            return tree
        name = self.weight_name(model)
        delta = self.scale * adapter["B"] @ adapter["A"].flatten(1)
        weight = tree[name] if name in tree else model.constants[name]
        return tree | {name: weight + delta.view(weight.shape).to(weight.dtype)}

    def features(self, model: Model, tree: Tree, x: Tensor) -> Tensor | None:
        """Return the features of x without the adapter; None for a ``conv`` adapter, which changes
        them.
        """
        return None if self.place == "conv" else model.features(tree, x)

    def logits(
        self, model: Model, tree: Tree, adapter: Tree, x: Tensor, z: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the network with the adapter, or of the adapter ``alone``.

        [B, ...] -> [B, classes].

        z: ``features`` of x, if they are known.
        """
        if self.place == "conv":
            return model(self.merge(model, tree, adapter), x)
        z = model.features(tree, x) if z is None else z
        adapter = {n: v.to(z.dtype) for n, v in adapter.items()}
        if self.place in ("matrix", "alone"):
            low_rank = self.scale * (z @ adapter["A"].T) @ adapter["B"].T
            return low_rank if self.place == "alone" else model.classify(tree, z) + low_rank
        return model.classify(
            tree, z + self.scale * (x.flatten(1).to(z.dtype) @ adapter["A"].T) @ adapter["B"].T
        )
