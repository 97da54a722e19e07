"""The contract between one algorithm file and the engine.

An algorithm is written for ONE client, as pure functions of that client's variables. The engine
adds the client axis, ``comm.py`` the rank axis; nothing here, and no algorithm file, names either.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Generator, Tensor

from .models.network import Model
from .tree import Tree


class Vars(NamedTuple):
    """One client's variables: ``shared`` came from the server, ``personal`` never leaves.

    ``constant`` holds what the running phase computed once from the other two (see ``Phase``).
    """

    shared: Tree
    personal: Tree
    constant: Tree = {}


class Batch(NamedTuple):
    """A mini-batch of one client."""

    x: Tensor  # [B, ...] float inputs, transformed and normalised
    y: Tensor  # [B] class index, int64
    real: Tensor | None  # [B] False for padding; None when all B examples are real
    key: Tensor  # [] int64, the address of this step's noise (dropout)


class Sgd(NamedTuple):
    """Local SGD as torch.optim.SGD defines it; momentum buffers start empty in every phase."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Train:
    """The ``train`` block: local training that all methods have in common."""

    epochs: int = 5
    batch_size: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for field, ok, allowed in (
            ("epochs", self.epochs >= 1, "an integer of at least 1"),
            ("batch_size", self.batch_size >= 1, "an integer of at least 1"),
            ("lr", self.lr > 0, "a number above 0"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "a number of at least 0"),
        ):
            if not ok:
                raise ValueError(f"{field} = {getattr(self, field)}: must be {allowed}")


Loss = Callable[[Vars, Vars, Batch], Tensor]  # (now, at the start of the round, batch) -> scalar


def every(leaf: str) -> bool:
    """Trains all leaves."""
    return True


class Phase(NamedTuple):
    """A stretch of local SGD: how long, under which loss, which leaves move.

    ``trains`` is asked for the names of shared and personal leaves alike. Leaves of role ``stats``
    are never trained; BatchNorm in training mode writes them, whatever the phase trains.
    """

    epochs: int
    loss: Loss
    trains: Callable[[str], bool] = every
    constant: Callable[[Vars], Tree] | None = None  # computed once, handed to ``loss`` as now.constant
    sgd: Callable[[Sgd], Sgd] | None = None  # this phase's settings from the common ones


class Algorithm(ABC):
    """Subclasses are frozen dataclasses whose fields are the hyper-parameters.

    Two class variables may be fields instead: ``weights``, by which number of the client its
    upload counts in the mean, and ``absent``, what clients outside the cohort count for.
    """

    weights: ClassVar[Literal["samples", "uniform"]] = "samples"
    absent: ClassVar[Literal["exclude", "stale"]] = "exclude"

    def check(self, model: Model, train: Train) -> None:
        """Raise ValueError when the fields do not go together with the model or the training."""

    @abstractmethod
    def init(self, model: Model, rng: Generator) -> Vars:
        """The variables of any client before the first round; all clients start equal."""

    @abstractmethod
    def phases(self, model: Model, train: Train) -> tuple[Phase, ...]:
        """Local training, in order. ``model`` is in training mode."""

    @abstractmethod
    def weights_of(self, model: Model, v: Vars) -> Tree:
        """The parameters and statistics of the client's own model, under the model's leaf names."""

    def logits(self, model: Model, v: Vars, x: Tensor) -> Tensor:
        """Prediction of the client's own model: [B, ...] -> [B, classes]."""
        return model(self.weights_of(model, v), x)

    def upload(self, start: Vars, end: Vars) -> Tree:
        """What enters the mean. Default: the trained shared leaves."""
        return end.shared

    def serve(self, shared: Tree, mean: Tree) -> Tree:
        """The next shared variables from the present ones and the mean. Default: the mean."""
        return mean
