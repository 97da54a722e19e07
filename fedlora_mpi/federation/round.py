"""One communication round: state in, state and metrics out, the same code on every rank."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..aggregation.aggregator import Received, Uploads
from ..aggregation.svd import right_vectors
from .cohorts import Cohort
from .evaluation import evaluate_clients
from .federation import Federation, State
from .report import report


def run_round(
    federation: Federation, state: State, evaluate: bool, stop: bool | Sequence[int]
) -> tuple[State, dict, dict]:
    """Run one round. Every rank calls it with its own state.

    Returns the next state, the row of the round (numbers) and the columns of the clients ([N]
    each), complete on every rank. ``stop``: whether this rank was asked to stop, or a list to which
    requests are added, also during the round; the row says whether any rank was. Raises Fault on
    all ranks if a client's loss or upload is not finite and such clients are not skipped.
    """
    cohort = federation.cohorts.sample(state.round)
    trained = train(federation, state, cohort, evaluate)
    received = aggregate(federation, trained, stop)
    new_state, metrics = update(federation, state, received)
    scores = evaluate_clients(federation, new_state, cohort, trained.scores) if evaluate else None
    return new_state, *report(federation, state, cohort, received, metrics, scores)


class Trained(NamedTuple):
    """This rank's part of the cohort after local training."""

    uploads: Uploads
    # [3 + m] of each client's own model, as ``Trainer.score_clients`` has them; empty unless
    # evaluated
    scores: dict[int, Tensor]


def train(federation: Federation, state: State, cohort: Cohort, evaluate: bool) -> Trained:
    """Train this rank's part of the cohort; its personal leaves go into their rows.

    A client whose loss or upload is not finite keeps its former personal leaves.
    """
    aggregator, store, clients = federation.aggregator, federation.store, cohort.clients
    with federation.instruments.stage("train", state.round):
        uploads = aggregator.collect(cohort, state.shared, clients.trainer.device)
        scores = {}
        for members in federation.placement.stacks(cohort):
            number, samples = clients.type_of[members[0]], sum(clients.sizes[c] for c in members)
            rows_C = store.read(state.personal, members)
            with federation.instruments.local_training(number, members, samples):
                for result in clients.types[number].trainer.train(
                    members, state.shared, rows_C, state.round, evaluate
                ):
                    if not aggregator.add(uploads, result):
                        continue
                    if result.score is not None:
                        scores[result.client] = result.score
                    store.write(state.personal, result.client, result.personal)
        return Trained(uploads, scores)


def aggregate(federation: Federation, trained: Trained, stop: bool | Sequence[int]) -> Received:
    """What the server receives of the cohort, on every rank: one sum of one flat buffer, after
    that of the clients' reports if the method has them.
    """
    with federation.instruments.stage("exchange", trained.uploads.cohort.round):
        return federation.aggregator.aggregate(trained.uploads, bool(stop))


def update(
    federation: Federation, state: State, received: Received
) -> tuple[State, dict[str, float]]:
    """The state after the server's rule and the mixes, and the method's numbers for the log."""
    metrics = dict.fromkeys(federation.algorithm.metrics, float("nan"))
    with federation.instruments.stage("exchange", state.round):
        for client, rows in received.mixed_rows.items():
            federation.store.write(state.personal, client, rows)
        if received.aggregate:
            new = federation.algorithm.server_update(
                state.server,
                state.shared,
                received.aggregate,
                partial(right_vectors, federation.comm),
            )
            state = state._replace(server=new.server, shared=new.shared)
            metrics |= new.metrics
        federation.store.release()
    return state._replace(round=state.round + 1), metrics
