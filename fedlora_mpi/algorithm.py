"""The contract between one algorithm file and the engine.

An algorithm is written for ONE client, as pure functions of that client's variables. The engine
adds the client axis and ``mpi/`` adds the rank axis. Neither appears here or in an algorithm file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Generator, Tensor

from .core.batch import Batch, cross_entropy
from .core.bounds import bounded
from .core.tree import Tree, numel
from .models.network import Model


class Variables(NamedTuple):
    """One client's variables: ``shared`` came from the server, ``personal`` never leaves.

    ``constant`` holds what the running phase computed once from the other two (see ``Phase``).
    """

    shared: Tree
    personal: Tree
    constant: Tree = {}


class Sgd(NamedTuple):
    """Local SGD as torch.optim.SGD defines it; momentum buffers start empty in every phase."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class LocalTraining:
    """The ``train`` block: local training that all methods have in common."""

    epochs: int = 5
    batch_size: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        bounded(self, epochs="[1, inf)", batch_size="[1, inf)", lr="(0, inf)")
        bounded(self, momentum="[0, 1)", weight_decay="[0, inf)")


FORMER_NAMES = {"Vars": "Variables", "Train": "LocalTraining", "Offer": "Mix"}  # still read


def __getattr__(name: str) -> type:
    if name in FORMER_NAMES:
        return globals()[FORMER_NAMES[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# (now, at the start of the round, batch) -> scalar
Loss = Callable[[Variables, Variables, Batch], Tensor]


def trains_all(leaf: str) -> bool:
    """Trains all leaves."""
    return True


class Step(NamedTuple):
    """One SGD step: its loss and the leaves that it trains.

    ``trains`` receives the names of shared and personal leaves alike. Leaves of role ``stats`` are
    never trained: BatchNorm in training mode writes them, whichever leaves train.
    """

    loss: Loss
    trains: Callable[[str], bool] = trains_all
    sgd: Callable[[Sgd], Sgd] | None = None  # this step's settings from the common ones
    clamp: tuple[float, float] | None = None  # bounds of the trained leaves after the step
    repeat: int = 1  # steps on the same batch


class Phase(NamedTuple):
    """A stretch of local SGD: all ``steps``, in order, on every batch of every epoch.

    A phase with its own ``stream`` draws its own batches and leaves those of other phases alone.
    """

    epochs: int
    steps: tuple[Step, ...]
    # computed once, handed to the losses as now.constant
    constant: Callable[[Variables], Tree] | None = None
    stream: str = ""
    # samples of an epoch that are used, from the client's number
    limit: Callable[[int], int] | None = None
    after: Callable[[Variables], Variables] | None = None  # what the variables become at the end
    held_out: bool = False  # on the samples that ``Algorithm.held_out`` takes from all other phases


def held_out_count(samples: int, fraction: float) -> int:
    """How many of a client's training samples are held out: at least one, never all; fraction 0
    holds out none.
    """
    return min(samples - 1, max(1, int(fraction * samples))) if fraction and samples else 0


class Mix(NamedTuple):
    """What a client offers to a per-client mix: leaves to mix, and what the weights depend on."""

    rows: Tree  # mixed over the clients; the result replaces the personal leaves of these names
    # [K] numbers or bools whose Gram matrix decides the weights; None: the rows themselves
    key: Tensor | None = None
    extra: Tensor | None = None  # [k] further numbers of the client that they depend on


class Cohort(NamedTuple):
    """The clients that took part in a round, as two numbers."""

    share: float  # fraction of all clients
    weight: float  # total weight of their uploads: the mean times it is the sum


FORMER_HOOKS = {  # former name: what the hook is called now
    "serve": "server_update",
    "tune": "personalize",
    "told": "server_metrics",
    "of_client": "for_client",
    "weights_of": "client_model",
    "sent": "upload_numel",
    "received": "download_numel",
    "surveys": "needs_all_data",
    "centred": "center_keys",
    "evaluates": "evaluate_on",
    "judges": "evaluate_on",
}


# the model whose accuracy is the method's
EvaluatedModel = Literal["after_aggregation", "after_training", "server"]


class Algorithm:
    """The hooks of a method. A subclass that overrides nothing is FedAvg; override what differs.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters. They may override the
    class variables below by plain values, fields or properties.

    weights: the weight of a client's upload in the mean.
    absent: whether clients outside the cohort are left out of the mean (``exclude``) or count
        with the present shared variables (``stale``).
    evaluate_on: the model whose accuracy is the method's. ``after_aggregation`` and
        ``after_training`` are moments of each client's own model; ``server`` is the server's model
        on every client's test data.
    center_keys: whether the keys of a mix are centred before their Gram matrix is computed, so
        that rounding does not cancel distances.
    sums: whether the server receives the sum of the uploads instead of their mean. Absent clients
        are then excluded.
    needs_all_data: whether ``begin`` and ``finish`` receive all training data in order, or only
        the first sample. The ``counts`` are those of all data in both cases.
    held_out: fraction of each client's training samples that only phases with ``held_out`` use,
        without augmentation. They are the same samples in all rounds of a task.
    """

    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "exclude"
    evaluate_on: EvaluatedModel = "after_aggregation"
    center_keys: bool = False
    sums: bool = False
    needs_all_data: bool = False
    held_out: float = 0.0

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for former, name in FORMER_HOOKS.items():
            if hasattr(cls, former):
                raise TypeError(
                    f"{cls.__name__}.{former}: this hook is called {name} now; rename it "
                    "(docs/add_a_method.md has all hooks)"
                )

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> None:
            hint = f"; it is called {FORMER_HOOKS[name]} now" if name in FORMER_HOOKS else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name}{hint}")

    def check(self, model: Model, train: LocalTraining) -> None:
        """Raise ValueError when the fields do not fit the model or the training."""

    def low_rank(self, model: Model) -> dict[str, int]:
        """{weight: rank} of the leaves that have a low-rank part; ``plan`` lists them. Default:
        none.
        """
        return {}

    def for_client(self, client: int, clients: int) -> "Algorithm":
        """The method with this client's hyper-parameters, such as its rank of low-rank parts. The
        server's hooks are called on the method itself. Default: the same for all clients.
        """
        return self

    # One client: its variables, its training, its upload.

    def init(self, model: Model, rng: Generator) -> Variables:
        """The variables of any client before the first round; all clients start equal. Default: all
        leaves of the model are shared."""
        return Variables(shared=model.initial, personal={})

    def download(self, shared: Tree) -> Tree:
        """The part of the server's shared variables that this client receives, cut to its own
        rank. A client's hooks see it as ``shared``. Default: all of it.
        """
        return shared

    def begin(self, model: Model, v: Variables, data: Batch) -> Variables:
        """The variables from which training starts, given those received. Default: the same."""
        return v

    def phases(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        """The phases of local training in round ``round_`` (from 0), in order. ``model`` is in
        training mode. Default: one phase that trains all leaves of the client's own model.
        """
        return (Phase(train.epochs, (Step(self.loss(model)),)),)

    def used(self, phase: Phase, samples: int) -> int:
        """How many training samples an epoch of the phase uses. Not to be overridden."""
        held = held_out_count(samples, self.held_out)
        part = held if phase.held_out else samples - held
        return min(part, phase.limit(part)) if phase.limit else part

    def loss(self, model: Model) -> Loss:
        """The cross-entropy of the client's own model, which most phases minimise."""

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return cross_entropy(self.logits(model, now, batch.x), batch)

        return loss

    def finish(
        self, model: Model, train: LocalTraining, start: Variables, end: Variables, data: Batch
    ) -> Variables:
        """What the client keeps after training, such as masks. Default: what it trained."""
        return end

    def upload(self, start: Variables, end: Variables) -> Tree:
        """What the client sends for the mean. Default: the trained shared leaves."""
        return end.shared

    def expand(self, upload: Tree, shared: Tree, count: int) -> Tree:
        """What enters the mean for an ``upload`` of weight ``count``, given the server's ``shared``
        variables of the round. Its leaves have the same shapes for all clients. Default: the upload
        itself.
        """
        return upload

    def offer(self, start: Variables, end: Variables) -> Mix | None:
        """What enters the mix that every client receives for itself. Default: there is no mix."""
        return None

    def upload_numel(self, start: Variables, end: Variables) -> Tensor | int:
        """How many numbers a client of a real federation would send. Default: its whole upload."""
        return numel(self.upload(start, end))

    def download_numel(self, shared: Tree) -> Tensor | int:
        """How many numbers it would receive from the server. Default: its whole download."""
        return numel(self.download(shared))

    # The server.

    def server(self, model: Model, shared: Tree) -> Tree:
        """Variables of the server alone, before the first round. Default: none."""
        return {}

    def server_update(
        self, server: Tree, shared: Tree, mean: Tree, cohort: Cohort
    ) -> tuple[Tree, Tree]:
        """The next (server, shared) variables from the present ones and the mean of the uploads of
        the ``cohort``. Default: the mean becomes the shared variables."""
        return server, mean

    def decomposed(self, shared: Tree) -> dict[str, tuple[Tensor, int]]:
        """The matrices whose right singular vectors the server needs after ``server_update``:
        {name: (matrix [d1, d2], how many)}. Idle ranks compute each once. Default: none.
        """
        return {}

    def handed_out(self, shared: Tree, right: Tree) -> Tree:
        """``shared`` completed by ``right`` {name: [k, d2]}, whose rows are orthonormal."""
        raise AssertionError(
            f"{type(self).__name__} has matrices decomposed but makes nothing of them"
        )

    def server_metrics(self, shared: Tree, clients: int) -> dict[str, float]:
        """Further numbers of the round for the log, from the next ``shared`` variables and the
        number of ``clients`` whose uploads made them. Default: none.
        """
        return {}

    def mix(self, gram: Tensor, extra: Tensor, round_: int) -> Tensor:
        """The weights [n, n] of the mix, one row per receiver, float64.

        gram: [n, n] inner products of the keys, float64; extra: [n, k] in the clients' order. n is
        at least 2: a client that is alone receives its own rows.
        """
        raise AssertionError(f"{type(self).__name__} offers rows but does not say how to mix them")

    # The evaluated model.

    def client_model(self, model: Model, v: Variables) -> Tree:
        """The parameters and statistics of the client's own model, under the model's leaf names.
        Default: all variables, shared and personal, that have such a name."""
        return {n: w for n, w in (v.shared | v.personal).items() if n in model.leaves}

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        """Prediction of the client's own model: [B, ...] -> [B, classes]."""
        return model(self.client_model(model, v), x)

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        """The phases that train a copy, on training data, before the evaluation in front of round
        ``round_``. Default: none.
        """
        return ()


def check_trainable(
    name: str,
    method: Algorithm,
    network: str,
    model: Model,
    train: LocalTraining,
    initial: Variables,
) -> None:
    """Raise ValueError if ``network`` has frozen parameters and ``method`` trains none of the rest.

    initial: the variables before round 1.
    """
    steps = [
        step
        for round_ in (0, 1)
        for phase in method.phases(model, train, round_)
        for step in phase.steps
    ]
    names = [n for tree in initial[:2] for n in tree if model.role(n) != "stats"]
    if model.frozen_leaves and not any(step.trains(n) for step in steps for n in names):
        raise ValueError(
            f"name = {name}: trains nothing, for all parameters of network {network} are frozen "
            f"(requires_grad is False, as of {next(iter(model.frozen_leaves))}); leave some to be "
            "trained, or choose a method that trains low-rank parts beside them, such as fedit"
        )
