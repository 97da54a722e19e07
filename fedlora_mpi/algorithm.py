"""The contract between one algorithm file and the engine.

An algorithm is written for ONE client, as pure functions of that client's variables. The engine
adds the client axis and ``mpi/`` adds the rank axis. Neither appears here or in an algorithm file.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from .core.batch import Batch
from .core.bounds import bounded
from .core.former_hooks import FORMER_HOOKS, refuse_former_hooks
from .core.names import factors_by_weight
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
    if name == "Cohort":
        raise ImportError("Cohort: server_update receives an Aggregate now, which has its numbers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# (now, at the start of the round, batch) -> scalar
Loss = Callable[[Variables, Variables, Batch], Tensor]


def trains_all(leaf: str) -> bool:
    """Trains all leaves."""
    return True


class Step(NamedTuple):
    """One SGD step: its loss and the leaves that it trains.

    ``trains`` receives the names of shared and personal leaves alike. Leaves of role ``stats`` are
    never trained: BatchNorm in training mode writes them, whichever leaves train. A loss may write
    likewise to leaves of the method's own that the step does not train, such as running moments.
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
    held_out: bool = False  # on the samples that ``Algorithm.held_out`` takes from all other phases


class Visit(NamedTuple):
    """One computation before, between or after phases, such as that of a mask or of class means.

    ``apply(start, now, data)`` returns the client's next variables. ``data`` is a batch of all its
    training samples in order if ``all_data``, else of the first sample; ``data.counts`` counts all
    of them in both cases. No gradient is recorded.
    """

    apply: Callable[[Variables, Variables, Batch], Variables]
    all_data: bool = False


def phases_of(items: Iterable[Phase | Visit]) -> tuple[Phase, ...]:
    """The phases among the ``items`` of a round, in order."""
    return tuple(item for item in items if isinstance(item, Phase))


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
    # whether keys are centred before their Gram matrix is computed, so that rounding does not
    # cancel distances
    centered: bool = False
    # whether the weights are those of the config's ``topology``: each client receives the rows of
    # its neighbours. There is then no key, and ``Algorithm.mix`` is not called.
    over_topology: bool = False


class Upload(NamedTuple):
    """What one client sends after local training, by channel.

    mean: leaves of which the server receives the weighted mean over the cohort.
    sum: leaves of which it receives the sum. Names in ``mean`` and ``sum`` differ.
    mix: what enters the mix that every client receives for itself; its rows go by their own way.
    numel: how many numbers a real federation would send for ``mean``, ``sum`` and ``report``; None:
        all.
    report: [k] numbers on which the weights of the cohort in the mean depend; see
        ``Algorithm.mean_factors``.
    """

    mean: Tree = {}
    sum: Tree = {}
    mix: Mix | None = None
    numel: Tensor | int | None = None
    report: Tensor | None = None

    @property
    def message(self) -> Tree:
        """The leaves of ``mean`` and ``sum``."""
        return self.mean | self.sum

    @property
    def sent_numel(self) -> int:
        """How many numbers a real federation would send, without those for the mix."""
        if self.numel is not None:
            return int(self.numel)
        return numel(self.message) + (0 if self.report is None else self.report.numel())


class Reports(NamedTuple):
    """What the clients of a cohort report (see ``Upload``), in ascending order of the clients."""

    clients: tuple[int, ...]
    numbers: Tensor  # [n, k], float64, on the host

    @classmethod
    def of(cls, uploads: Mapping[int, Upload]) -> "Reports | None":
        """The reports of these clients; None if they have none."""
        reports = {client: uploads[client].report for client in sorted(uploads)}
        rows = [report.double().cpu() for report in reports.values() if report is not None]
        return cls(tuple(reports), torch.stack(rows)) if rows else None


class Term(NamedTuple):
    """What an upload adds to the aggregate, in the same shapes for all clients.

    mean, sum: as in ``Upload``.
    weights: {leaf of ``mean``: [] its weight in the mean}, where that is not the client's own.
    metrics: leaves whose mean the server uses for the log alone; no real federation sends them.
    """

    mean: Tree = {}
    sum: Tree = {}
    weights: Tree = {}
    metrics: Tree = {}


class Aggregate(NamedTuple):
    """What the server has received from the cohort of a round.

    mean, sum, metrics: over the cohort, as in ``Term``; uploads of clients outside the cohort count
        in ``mean`` as ``Algorithm.absent`` says.
    round: number of the round, from 0.
    clients: how many clients took part.
    share: these as a fraction of all clients.
    weight: total weight of their uploads.
    reports: what they reported; None if the method's uploads have no ``report``.
    """

    mean: Tree
    sum: Tree
    metrics: Tree
    round: int
    clients: int
    share: float
    weight: float
    reports: Reports | None = None


class Update(NamedTuple):
    """The server's variables after a round, and numbers of it for the log."""

    shared: Tree
    server: Tree = {}
    metrics: Mapping[str, float] = {}  # under the names of ``Algorithm.metrics``


# ``svd({name: (matrix [d1, d2], k)})`` gives {name: [k, d2]}, the first k right singular vectors
Svd = Callable[[dict[str, tuple[Tensor, int]]], Tree]


def _receive_all(shared: Tree) -> Tree:
    return shared


def _as_term(upload: Upload, shared: Tree, weight: int) -> Term:
    return Term(upload.mean, upload.sum)


class Transport(NamedTuple):
    """What travels to and from one client, where clients differ, for instance in their rank.

    method: the method with the hyper-parameters of this client. The server's hooks are called on
        the method of the config. Clients with equal methods and the same network share the
        transport of the first of them.
    download: the part of the server's ``shared`` variables that the client receives. Its hooks see
        that as ``shared``. Default: all of them.
    expand: (upload, shared, weight) -> what the ``mean`` and ``sum`` of an upload add to the
        aggregate, given the server's ``shared`` variables of the round and the client's weight.
        Default: these themselves.
    download_numel: (server, shared, round) -> how many numbers a real federation would send to the
        client, from the server's own and shared variables of the round. None: the whole download.
    """

    method: "Algorithm"
    download: Callable[[Tree], Tree] = _receive_all
    expand: Callable[[Upload, Tree, int], Term] = _as_term
    download_numel: Callable[[Tree, Tree, int], Tensor | int] | None = None

    @property
    def expands(self) -> bool:
        """Whether terms are something else than uploads."""
        return self.expand is not _as_term

    def untrained_upload(self, initial: Variables, shared: Tree) -> Upload:
        """What the client would send in round 0 without training; ``initial``: its variables before
        round 1, ``shared``: the server's current ones.
        """
        v = initial._replace(shared=self.download(shared))
        return self.method.upload(v, v, 0)

    def untrained_term(self, initial: Variables, shared: Tree) -> Term:
        """What that upload adds to the aggregate."""
        upload = self.untrained_upload(initial, shared)
        return self.expand(Upload(upload.mean, upload.sum), shared, 1)


# the model whose accuracy is the method's
EvaluatedModel = Literal["after_aggregation", "after_training", "server"]


class Algorithm:
    """The hooks of a method. A subclass that overrides nothing is FedAvg; override what differs.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters. They may override the
    class variables below by plain values, fields or properties.

    evaluate_on: the model whose accuracy is the method's. ``after_aggregation`` and
        ``after_training`` are moments of each client's own model; ``server`` is the server's model
        on every client's test data.
    held_out: fraction of each client's training samples that only phases with ``held_out`` use,
        without augmentation. They are the same samples in all rounds of a task.
    metrics: names of the numbers that ``server_update`` returns for the log.
    needs_class_labels: whether the method needs a class of each sample. Others work with any
        ``model.loss``.
    """

    # weight of a client's upload in the mean: its training samples, or the same for all clients;
    # default: FedAvg, Algorithm 1
    weights: Literal["samples", "uniform"] = "samples"
    # clients outside the cohort are left out of the mean (exclude), or count with the present
    # shared variables (stale); default: FedAvg, Algorithm 1
    absent: Literal["exclude", "stale"] = "exclude"
    evaluate_on: EvaluatedModel = "after_aggregation"
    held_out: float = 0.0
    metrics: tuple[str, ...] = ()
    needs_class_labels: bool = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        _check_hooks(cls)

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> None:
            hint = f"; instead there is {FORMER_HOOKS[name]}" if name in FORMER_HOOKS else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name}{hint}")

    def check(self, model: Model, train: LocalTraining) -> None:
        """Raise ValueError when the fields do not fit the model or the training. ``warnings.warn``
        about what is allowed but doubtful; a run prints this as a hint.
        """

    # One client.

    def init(self, model: Model, rng: Generator) -> Variables:
        """The variables of any client before the first round; all clients start equal. Default: all
        leaves of the model are shared."""
        return Variables(shared=model.initial, personal={})

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        """The client's round ``round_`` (from 0), in order of time. ``model`` is in training mode.

        Losses and visits receive ``start``: the variables before the first phase, after the visits
        in front of it. Those visits receive the variables so far as both ``start`` and ``now``. If
        there is no phase, ``start`` is what has arrived. Default: one phase that trains all leaves
        of the client's own model.
        """
        return (Phase(train.epochs, (Step(self.loss(model)),)),)

    def loss(self, model: Model) -> Loss:
        """The loss of the client's own model, which most phases minimise."""

        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return model.loss(self.logits(model, now, batch.x), batch)

        return loss

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        """What the client sends after round ``round_``. Default: the trained shared leaves, for
        the mean.
        """
        return Upload(mean=end.shared)

    def transport(self, client: int, clients: int) -> Transport:
        """What differs between clients, for number ``client`` of so many. Default: nothing."""
        return Transport(self)

    # The server.

    def server(self, model: Model, shared: Tree) -> Tree:
        """Variables of the server alone, before the first round. Default: none."""
        return {}

    def mean_factors(self, reports: Reports, round_: int) -> Tensor:
        """The factors [n] of the clients' weights in the mean, float64, from what they report. Each
        is at least 0. Their mean over the cohort, with these weights, is 1.
        """
        raise AssertionError(f"{type(self).__name__} reports numbers but does not use them")

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        """The next variables, from the present ones and what the cohort sent. ``svd`` shares the
        work on large matrices among idle ranks. Default: the mean becomes the shared variables.
        """
        return Update(aggregate.mean, server)

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

    def personalize(
        self, model: Model, train: LocalTraining, round_: int
    ) -> tuple[Phase | Visit, ...]:
        """What trains a copy, on training data, before the evaluation in front of round ``round_``,
        as in ``local``. A client without training samples has no batch to train on; its visits see
        an empty one. Default: nothing.
        """
        return ()


HOOKS = (
    "check", "init", "local", "loss", "upload", "transport", "server", "mean_factors",
    "server_update", "mix",
    "client_model", "logits", "personalize",
)  # fmt: skip


def _check_hooks(cls: type[Algorithm]) -> None:
    """Raise TypeError for a hook of an earlier version, or one with other parameters."""
    page = "docs/add_a_method.md has all hooks"
    refuse_former_hooks(cls, page)
    for hook in HOOKS:
        names = [*inspect.signature(getattr(cls, hook)).parameters]
        expected = [*inspect.signature(getattr(Algorithm, hook)).parameters]
        if len(names) != len(expected) or {"mean", "cohort"} & {*names}:
            raise TypeError(
                f"{cls.__name__}.{hook}({', '.join(names[1:])}): must take "
                f"({', '.join(expected[1:])}); {page}"
            )


def dataclass_mistake(cls: type[Algorithm]) -> str:
    """Why a class is not the frozen dataclass that its fields need, with the way out; "" if it is.

    A subclass without fields of its own may leave the decorator to its base.
    """
    way_out = "put @dataclass(frozen=True) above the class"
    if not is_dataclass(cls):
        return f"must be a frozen dataclass; {way_out}"
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"is a dataclass that is not frozen; {way_out}"
    new_fields = [
        n
        for n, annotation in inspect.get_annotations(cls).items()
        if not hasattr(Algorithm, n) and "ClassVar" not in str(annotation)
    ]
    if new_fields and "__dataclass_params__" not in vars(cls):
        return f"is no dataclass of its own, so {new_fields[0]} is no field; {way_out}"
    return ""


def misspelt_hooks(cls: type[Algorithm]) -> list[str]:
    """A line for each public method of the class whose name is nearly that of a hook."""
    methods = [
        name
        for name, value in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") and not hasattr(Algorithm, name)
    ]
    matches = {name: get_close_matches(name, HOOKS, 1, cutoff=0.8) for name in methods}
    return [
        f"{n} is no hook; did you mean {hook}?" for n, hooks in matches.items() for hook in hooks
    ]


def low_rank_of(initial: Variables) -> dict[str, int]:
    """{weight: rank} of the weights that have factors A and B among these variables of a client."""
    factors = factors_by_weight(initial.shared | initial.personal, "A")
    return {weight: len(A) for weight, A in factors.items()}


def used_samples(method: Algorithm, phase: Phase, samples: int) -> int:
    """How many of a client's training samples an epoch of the phase uses."""
    held = held_out_count(samples, method.held_out)
    part = held if phase.held_out else samples - held
    return min(part, phase.limit(part)) if phase.limit else part


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
        for phase in phases_of(method.local(model, train, round_))
        for step in phase.steps
    ]
    names = [n for tree in initial[:2] for n in tree if model.role(n) != "stats"]
    if model.frozen_leaves and not any(step.trains(n) for step in steps for n in names):
        raise ValueError(
            f"name = {name}: trains nothing, for all parameters of network {network} are frozen "
            f"(requires_grad is False, as of {next(iter(model.frozen_leaves))}); leave some to be "
            "trained, or choose a method that trains low-rank parts beside them, such as fedit"
        )
