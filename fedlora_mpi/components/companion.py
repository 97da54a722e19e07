"""A small network g of one architecture that all clients share, beside the network F of each
client's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Train, Vars
from ..core.batch import Batch
from ..core.names import own_name
from ..core.tree import Tree, prefixed, under
from ..models.network import Model
from ..models.zoo import build

SMALL = own_name("small")


@dataclass(frozen=True)
class Companion(Algorithm):
    """Leaves of g are shared as "small.<leaf>", those of F are personal; the client's own model is
    F.

    ``small``: what a config's ``model.name`` may be. Clients count equally, as in the authors'
    codes.
    """

    small: str = "cnn5"
    weights: Literal["samples", "uniform"] = "uniform"
    absent: Literal["exclude", "stale"] = "exclude"

    def check(self, model: Model, train: Train) -> None:
        try:
            self.g(model)
        except ValueError as error:
            reason = str(error).removeprefix("name").removeprefix(f" = {self.small}")
            raise ValueError(f"small = {self.small}{reason}") from error

    def init(self, model: Model, rng: Generator) -> Vars:
        seed = int(torch.randint(2**62, (), generator=rng))
        g = build(self.small, {}, model.classes, model.shape, seed)
        return Vars(shared=prefixed(g.initial, SMALL), personal=model.initial)

    def g(self, model: Model) -> Model:
        """The small network for the inputs and classes of ``model``, in its mode."""
        return replace(_skeleton(self.small, model.classes, model.shape), training=model.training)

    def of_g(self, v: Vars) -> Tree:
        """The leaves of g, under its own names."""
        return under(v.shared, SMALL)

    def prepared(self, model: Model, batch: Batch) -> AbstractContextManager:
        """What g runs under in training. It draws other noise than F, of which the engine takes
        care.
        """
        return self.g(model).prepared(batch._replace(key=batch.key + 1))

    def logits_of_both(self, model: Model, v: Vars, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those of F and of g on a batch of training, [B, classes] each."""
        own = model(self.weights_of(model, v), batch.x)
        with self.prepared(model, batch):
            return own, self.g(model).to(batch.x.device)(self.of_g(v), batch.x)

    def trains(self, model: Model, *more: str) -> Callable[[str], bool]:
        """Whether a leaf is trained: the parameters of F and of g, and ``more``."""
        g = self.g(model)
        small = {SMALL + n for n in g.leaves if g.role(n) != "stats"}
        return {*model.leaves, *small, *more}.__contains__


@lru_cache(maxsize=8)
def _skeleton(name: str, classes: int, shape: tuple[int, ...]) -> Model:
    """A network of which only the layers count, not the weights."""
    return build(name, {}, classes, shape, seed=0)
