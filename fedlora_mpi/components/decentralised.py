"""A method over a topology: what its server averages, each client mixes with its neighbours."""

from dataclasses import dataclass

from torch import Generator, Tensor

from ..algorithm import (
    Algorithm,
    EvaluatedModel,
    LocalTraining,
    Loss,
    Mix,
    Phase,
    Step,
    Transport,
    Upload,
    Variables,
    Visit,
)
from ..core.batch import Batch
from ..core.seeds import rng
from ..core.tree import Tree, split
from ..models.network import Model


@dataclass(frozen=True)
class Decentralised(Algorithm):
    """``inner`` without its server, for each client i with the weights W_ij of the topology:

        inner's server:  shared <- sum_j p_j u_j      here:  shared_i <- sum_j W_ij u_j

    u_j is what inner's client j sends for the mean. To the engine the shared variables are personal
    ones, under the same names; inner's hooks see them as ``shared``.
    """

    inner: Algorithm
    shared_leaves: frozenset[str]

    weights = "uniform"

    @property
    def evaluate_on(self) -> EvaluatedModel:  # type: ignore[override]
        return self.inner.evaluate_on

    @property
    def held_out(self) -> float:  # type: ignore[override]
        return self.inner.held_out

    @property
    def needs_class_labels(self) -> bool:  # type: ignore[override]
        return self.inner.needs_class_labels

    def check(self, model: Model, train: LocalTraining) -> None:
        self.inner.check(model, train)

    def init(self, model: Model, rng: Generator) -> Variables:
        return _join(self.inner.init(model, rng))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        return tuple(map(self._over_copies, self.inner.local(model, train, round_)))

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        upload = self.inner.upload(self._split(start), self._split(end), round_)
        return Upload(mix=Mix(upload.mean, over_topology=True))

    def transport(self, client: int, clients: int) -> Transport:
        transport = self.inner.transport(client, clients)
        return Transport(Decentralised(transport.method, self.shared_leaves))

    def client_model(self, model: Model, v: Variables) -> Tree:
        return self.inner.client_model(model, self._split(v))

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        return self.inner.logits(model, self._split(v), x)

    def personalize(
        self, model: Model, train: LocalTraining, round_: int
    ) -> tuple[Phase | Visit, ...]:
        return tuple(map(self._over_copies, self.inner.personalize(model, train, round_)))

    def _split(self, v: Variables) -> Variables:
        """The variables as inner's hooks see them."""
        shared, personal = split(v.personal, self.shared_leaves.__contains__)
        return Variables(shared, personal, v.constant)

    def _over_copies(self, item: Phase | Visit) -> Phase | Visit:
        """``item`` of inner on this client's copies of the shared variables."""
        if isinstance(item, Visit):
            apply = item.apply

            def visit(start: Variables, now: Variables, data: Batch) -> Variables:
                return _join(apply(self._split(start), self._split(now), data))

            return item._replace(apply=visit)
        steps = tuple(step._replace(loss=self._loss_over_copies(step)) for step in item.steps)
        compute_constant = item.constant
        if compute_constant is None:
            return item._replace(steps=steps)

        def constant(v: Variables) -> Tree:
            return compute_constant(self._split(v))

        return item._replace(steps=steps, constant=constant)

    def _loss_over_copies(self, step: Step) -> Loss:
        def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
            return step.loss(self._split(now), self._split(start), batch)

        return loss


def _join(v: Variables) -> Variables:
    return Variables({}, v.shared | v.personal, v.constant)


def over_topology(method: Algorithm, model: Model) -> Algorithm:
    """The method as it runs over a topology: itself if it mixes over one, else ``Decentralised``.

    Raises ValueError, "has a server that ...", if its server does more than take a mean.
    """
    first = method.init(model, rng(0, "init"))
    upload = method.upload(first, first, 0)
    if upload.mix and upload.mix.over_topology:
        return method
    if reason := _server_reason(method, first, upload):
        raise ValueError(
            f"{reason}; over a topology there is none: choose dpsgd, or a method that shares by a "
            "mean alone, such as fedavg or fedlora"
        )
    return Decentralised(method, frozenset(first.shared))


def _server_reason(method: Algorithm, first: Variables, upload: Upload) -> str:
    """What the method needs a server for, beside a mean of the shared variables; "" if nothing."""
    if upload.mix:
        return "has a server that decides the weights of its mixes"
    if upload.report is not None:
        return "has a server that decides the weights of its mean"
    if not first.shared:
        return "shares nothing, so its clients have nothing to exchange"
    layouts = [{n: v.shape for n, v in tree.items()} for tree in (first.shared, upload.mean)]
    cls = type(method)
    if (
        cls.server_update is not Algorithm.server_update
        or cls.server is not Algorithm.server
        or upload.sum
        or upload.numel is not None
        or layouts[0] != layouts[1]
    ):
        return "has a server that makes something else of uploads than their mean"
    plain, transport = Transport(method), method.transport(0, 1)
    if transport._replace(method=method) != plain:
        return "has a server that sends each client something of its own"
    return "has a server whose model is evaluated" if method.evaluate_on == "server" else ""
