"""Methods in which all clients share a small network g and each has its own network F beside it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import LocalTraining, Variables
from ..core.batch import Batch
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model
from ..models.zoo import build
from .averaging import Averaging

SMALL_PREFIX = method_leaf_name("small")


@dataclass(frozen=True)
class Companion(Averaging):
    """A shared network g beside a personal network F, which is the client's own model.

    The leaves of g are shared as "small.<leaf>"; those of F are personal.
    """

    needs_class_labels = True
    # the small network g, any ``model.name``; default: our choice, the smallest of pFedLoRA's five
    # networks, as its authors compare with these methods
    small: str = "cnn5"
    weights: Literal["samples", "uniform"] = "uniform"  # default: the authors' codes

    def check(self, model: Model, train: LocalTraining) -> None:
        try:
            self.g(model)
        except ValueError as error:
            reason = str(error).removeprefix("name").removeprefix(f" = {self.small}")
            raise ValueError(f"small = {self.small}{reason}") from error

    def init(self, model: Model, rng: Generator) -> Variables:
        seed = int(torch.randint(2**62, (), generator=rng))
        g = build(self.small, {}, model.classes, model.shape, seed)
        return Variables(shared=add_prefix(g.initial, SMALL_PREFIX), personal=model.initial)

    def g(self, model: Model) -> Model:
        """Return the small network for the inputs and classes of ``model``, in its mode."""
        return replace(_skeleton(self.small, model.classes, model.shape), training=model.training)

    def g_leaves(self, v: Variables) -> Tree:
        """Return the leaves of g under its own names."""
        return select_prefix(v.shared, SMALL_PREFIX)

    def training_context(self, model: Model, batch: Batch) -> AbstractContextManager:
        """Return the context in which g trains; g draws other noise than F."""
        return self.g(model).training_context(batch._replace(key=batch.key + 1))

    def both_logits(self, model: Model, v: Variables, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of F and of g on a training batch, [B, classes] each."""
        own_logits = model(self.client_model(model, v), batch.x)
        with self.training_context(model, batch):
            return own_logits, self.g(model).to(batch.x.device)(self.g_leaves(v), batch.x)

    def trained_leaves(self, model: Model, *extra_leaves: str) -> Callable[[str], bool]:
        """Return the predicate that is true for the names of trained leaves.

        These are the parameters of F and of g, and ``extra_leaves``.
        """
        g = self.g(model)
        small_leaves = {SMALL_PREFIX + n for n in g.leaves if g.role(n) != "stats"}
        return {*model.leaves, *small_leaves, *extra_leaves}.__contains__


@lru_cache(maxsize=8)
def _skeleton(name: str, classes: int, shape: tuple[int, ...]) -> Model:
    """Return a network of which only the layers are used, not the weights."""
    return build(name, {}, classes, shape, seed=0)
