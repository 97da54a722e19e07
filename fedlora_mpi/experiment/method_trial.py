"""Tries the hooks of a user's method once before anything is trained, so that a mistake is one line
that names it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from ..aggregation.svd import right_vectors
from ..algorithm import (
    Aggregate,
    Algorithm,
    LocalTraining,
    Mix,
    Reports,
    Term,
    Transport,
    Update,
    Upload,
    Variables,
)
from ..core.names import display_name
from ..core.seeds import isolate_rng, rng
from ..core.tree import tmap
from ..engine.method_guard import (
    MethodMistake,
    call,
    check_items,
    describe_type,
    need_layout,
    need_trees,
    need_type,
    need_variables,
    with_checked_roles,
)
from ..models.network import Model
from ..mpi.comm import Solo

_ROUNDS = (0, 1)  # some methods alternate


@dataclass(frozen=True)
class MethodTrial:
    """A method on one network, and what its hooks return before round 1.

    Each property tries a hook and raises MethodMistake, as the functions below do.
    """

    method: Algorithm
    model: Model = field(repr=False)
    train: LocalTraining
    clients: int
    seed: int

    @cached_property
    def checked_model(self) -> Model:
        """The network in training mode; its roles refuse words that are no role."""
        return with_checked_roles(self.model)

    @cached_property
    def transport(self) -> Transport:
        """That of client 0."""
        transports = [self._transport_of(client) for client in range(self.clients)]
        return transports[0]

    def _transport_of(self, client: int) -> Transport:
        contract = "it must return Transport(method, download, expand, download_numel)"
        value = call("transport", lambda: self.method.transport(client, self.clients))
        transport = need_type("transport", value, Transport, contract)
        if not isinstance(transport.method, Algorithm):
            raise MethodMistake(
                f"transport returns {describe_type(transport.method)} as method; it must be a "
                "method, such as Transport(self)"
            )
        return transport

    def _initialize(self, method: Algorithm) -> Variables:
        model, generator = self.checked_model, rng(self.seed, "init")
        value = call("init", lambda: method.init(model, generator), model.initial)
        return need_variables("init", value)

    @cached_property
    def server_variables(self) -> Variables:
        """What the method of the config returns."""
        return self._initialize(self.method)

    @cached_property
    def variables(self) -> Variables:
        """The variables of client 0, with copies of the leaves."""
        personal = self._initialize(self.transport.method).personal
        shared = self.server_variables.shared
        download = self.transport.download
        received = call("the download of transport", lambda: download(shared), shared)
        need_trees("the download of transport", shared=received)
        return Variables(tmap(torch.clone, received), tmap(torch.clone, personal))

    @cached_property
    def upload(self) -> Upload:
        """What client 0 would send without training."""
        v, method = self.variables, self.transport.method
        value = call("upload", lambda: method.upload(v, v, 0), v.shared, v.personal)
        contract = "it must return Upload(mean=..., sum=..., mix=..., numel=..., report=...)"
        upload = need_type("upload", value, Upload, contract)
        need_trees("upload", mean=upload.mean, sum=upload.sum)
        if upload.mix is not None:
            mix = need_type("upload", upload.mix, Mix, "its mix must be Mix(rows, key, extra)")
            need_trees("upload", rows=mix.rows)
        if upload.report is not None:
            need_trees("upload", report={"report": upload.report})
        return upload

    @cached_property
    def term(self) -> Term:
        """What that upload adds to the aggregate."""
        shared, expand = self.server_variables.shared, self.transport.expand
        upload = Upload(self.upload.mean, self.upload.sum)  # no more travels
        hook = "the expand of transport"
        value = call(hook, lambda: expand(upload, shared, 1), shared, upload.mean, upload.sum)
        term = need_type(hook, value, Term, "it must return Term(mean, sum, weights, metrics)")
        need_trees(hook, mean=term.mean, sum=term.sum, weights=term.weights, metrics=term.metrics)
        return term


def check_init(trial: MethodTrial) -> None:
    """``init`` and ``client_model``: every leaf of the network has one place."""
    server = trial.server_variables
    if both := server.shared.keys() & server.personal.keys():
        raise MethodMistake(
            f"init puts {display_name(min(both))} into both shared and personal; a leaf has one "
            "place"
        )
    method, model, v = trial.transport.method, trial.checked_model, trial.variables
    overrides = type(method)
    has_own_logits = overrides.logits is not Algorithm.logits
    is_default = overrides.client_model is Algorithm.client_model
    if is_default and has_own_logits:
        return  # these need not know a model of the client
    tree = call("client_model", lambda: method.client_model(model, v), v.shared, v.personal)
    need_trees("client_model", leaves=tree)
    missing = [n for n in model.leaves if n not in tree]
    if missing:
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise MethodMistake(
            f"init omits {len(missing)} of {len(model.leaves)} leaves of the network ({names}), so "
            "that client_model lacks them; put each leaf of model.initial into shared or personal"
            if is_default
            else f"client_model lacks {len(missing)} of {len(model.leaves)} leaves of the network "
            f"({names}); it must return them all"
        )
    way_out = "it must have the shapes of the network"
    leaves = {n: tree[n] for n in model.leaves}
    need_layout("client_model", leaves, {n: model.initial[n] for n in model.leaves}, way_out)


def check_local(trial: MethodTrial) -> None:
    """``local`` and ``personalize``: phases and visits, of which each step trains a leaf."""
    method, model, v = trial.transport.method, trial.checked_model, trial.variables
    leaves = [n for tree in v[:2] for n in tree if n not in model.leaves or _is_trainable(model, n)]
    hooks: tuple[tuple[str, Callable], ...] = (
        ("local", method.local),
        ("personalize", method.personalize),
    )
    for hook, function in hooks:
        for round_ in _ROUNDS:
            items = call(hook, partial(function, model, trial.train, round_))
            check_items(hook, items, leaves)


def _is_trainable(model: Model, leaf: str) -> bool:
    return model.leaves[leaf].role != "stats"


def check_upload(trial: MethodTrial) -> None:
    """``transport`` and ``upload``: what travels is what the server expects."""
    term, shared = trial.term, trial.server_variables.shared
    if both := trial.upload.mean.keys() & trial.upload.sum.keys():
        raise MethodMistake(
            f"upload puts {display_name(min(both))} into both mean and sum; a leaf has one channel"
        )
    if type(trial.method).server_update is Algorithm.server_update:
        way_out = (
            "without a server_update the mean becomes the shared variables, so upload exactly "
            "these, or write server_update(server, shared, aggregate, svd)"
        )
        need_layout(
            "the mean of upload, compared with the shared leaves,", term.mean, shared, way_out
        )
    if (mix := trial.upload.mix) is not None:
        personal = {n: v for n, v in trial.variables.personal.items() if n in mix.rows}
        need_layout("the mix of upload", mix.rows, personal, "its rows replace personal leaves")
        if not mix.over_topology:  # whose weights the method does not know
            _check_mix(trial.method, mix)
    if trial.upload.report is not None:
        _check_factors(trial.method, trial.upload.report)


def _check_mix(method: Algorithm, mix: Mix) -> None:
    """Two clients with orthogonal keys and equal extra numbers."""
    gram = torch.eye(2, dtype=torch.float64)
    extra = torch.zeros(2, 0) if mix.extra is None else torch.stack([mix.extra, mix.extra])
    weights = call("mix", lambda: method.mix(gram, extra, 0), {"gram": gram, "extra": extra})
    need_type("mix", weights, Tensor, "it must return the weights [n, n]")
    if weights.shape != (2, 2):
        raise MethodMistake(
            f"mix returns a tensor of shape {list(weights.shape)} for n = 2 clients; it must "
            "return the weights [n, n]"
        )


def _check_factors(method: Algorithm, report: Tensor) -> None:
    """Two clients with equal reports."""
    if report.dim() != 1:
        raise MethodMistake(
            f"the report of upload has the shape {list(report.shape)}; it must be [k], k numbers"
        )
    reports = Reports((0, 1), torch.stack([report, report]).double())
    tree = {"numbers": reports.numbers}
    factors = call("mean_factors", lambda: method.mean_factors(reports, 0), tree)
    need_type("mean_factors", factors, Tensor, "it must return the factors [n]")
    if factors.shape != (2,):
        raise MethodMistake(
            f"mean_factors returns a tensor of shape {list(factors.shape)} for n = 2 clients; it "
            "must return the factors [n]"
        )
    if factors.min() < 0 or abs(float(factors.mean()) - 1) > 1e-6:
        raise MethodMistake(
            f"mean_factors returns {factors.tolist()} for two clients with equal reports; factors "
            "must be at least 0 and have the mean 1"
        )


def check_server(trial: MethodTrial) -> None:
    """``server`` and ``server_update``: the variables of the next round are those of this one."""
    method, model, shared = trial.method, trial.checked_model, trial.server_variables.shared
    server = call("server", lambda: method.server(model, shared), shared)
    need_trees("server", variables=server)
    term = trial.term
    mean, total, metrics = (tmap(torch.clone, t) for t in (term.mean, term.sum, term.metrics))
    reports = Reports.of({0: trial.upload})
    aggregate = Aggregate(mean, total, metrics, 0, 1, 1 / trial.clients, 1.0, reports)

    def run_hook() -> Update:
        return method.server_update(server, shared, aggregate, partial(right_vectors, Solo()))

    hook = "server_update"
    value = call(hook, run_hook, server, shared, mean, total, metrics)
    update = need_type(hook, value, Update, "it must return Update(shared, server, metrics)")
    need_trees(hook, shared=update.shared, server=update.server)
    way_out = "it must return the names and shapes that {} returns"
    need_layout(f"the shared tree of {hook}", update.shared, shared, way_out.format("init"))
    need_layout(f"the server tree of {hook}", update.server, server, way_out.format("server"))
    for name in update.metrics:
        if name not in method.metrics:
            raise MethodMistake(
                f"{hook} returns the metric {name}, which is not in the class variable metrics = "
                f"{method.metrics!r}; name it there"
            )


# by the name under which ``fedlora-mpi check`` reports them
CHECKS: Mapping[str, Callable[[MethodTrial], None]] = {
    "init": check_init,
    "local": check_local,
    "upload": check_upload,
    "server_update": check_server,
}


def try_method(
    name: str,
    method: Algorithm,
    models: Sequence[Model],
    train: LocalTraining,
    clients: int,
    seed: int,
    checks: Iterable[Callable[[MethodTrial], None]] = tuple(CHECKS.values()),
) -> None:
    """Raise ValueError for a mistake of the user's method ``name`` that a trial of its hooks shows.

    A hook that cannot divide by what an untrained client sends is no mistake.
    """
    with isolate_rng(seed, "trial"):  # a method that draws from a global generator draws as before
        for model in models:
            trial = MethodTrial(method, model, train, clients, seed)
            for check in checks:
                try:
                    check(trial)
                except MethodMistake as mistake:
                    if isinstance(mistake.__cause__, ArithmeticError):
                        continue
                    raise ValueError(f"name = {name}: {mistake}") from mistake.__cause__
