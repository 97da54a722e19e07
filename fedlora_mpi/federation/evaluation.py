"""Scores of the clients' own models on their own test data."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..core.clock import STAGES
from .cohorts import Cohort
from .consensus import consensus_distances
from .federation import Federation, State


class Scores(NamedTuple):
    """Results of an evaluation, equal on all ranks; NaN for clients that were not evaluated."""

    columns: dict[str, np.ndarray]  # [N] each, by ``Federation.score_names``
    nan_predictions: np.ndarray  # [N] fraction of test samples with a NaN logit
    seconds: dict[str, np.ndarray]  # {stage: [R]} of each rank since the last evaluated round


def evaluate_clients(
    federation: Federation, state: State, cohort: Cohort, trained: Mapping[int, Tensor]
) -> Scores:
    """Evaluate the cohort or everybody, each client with its own model on its own test data.

    trained: scores [3 + m] of this rank's clients right after training. ``accuracy``, ``loss``,
    ``nan_predictions`` and the m metrics are those of the model that ``Algorithm.evaluate_on``
    names. A client outside the cohort was not trained: it has NaN after training, and its model
    after aggregation counts. A client without a test sample of the classes so far has NaN in both.
    """
    comm, instruments = federation.comm, federation.instruments
    # the task of the round; the state counts the next one
    clients = cohort.clients
    everyone = len(clients)
    evaluated = cohort.members if federation.evaluate_cohort_only else range(everyone)
    with instruments.stage("evaluate", cohort.round):
        # scores of the clients at two moments, then seconds of the ranks; a last column over a
        # topology
        width = 3 + len(federation.metrics)
        table = np.zeros((everyone + comm.size, 2 * width + (federation.matrix is not None)))
        for group in federation.placement.groups_of(comm.rank):
            members_of_group = [c for c in group if c in evaluated]
            if not members_of_group:
                continue
            trainer = clients[group[0]].trainer
            at_least = trainer.evaluation_stack_size(members_of_group, state.round)
            for members in federation.placement.split_into_stacks(
                members_of_group, clients, at_least
            ):
                instruments.heartbeat.enter_stage("the evaluation", members)
                rows_C = federation.store.read(state.personal, members)
                scores_C = trainer.score_clients(members, state.shared, rows_C, state.round)
                table[members, :width] = scores_C.numpy()
                table[members, width : 2 * width] = [
                    trained[c].tolist() if c in trained else [np.nan] * width for c in members
                ]
        for client, distance in consensus_distances(federation, state).items():
            table[client, -1] = distance
        table[everyone + comm.rank, : len(STAGES)] = instruments.take_seconds("evaluate")
        federation.store.release()
        comm.sum(table)  # each row is set by one rank, so no rounding
    unevaluated = np.arange(len(table)) < everyone
    unevaluated[list(evaluated)] = False
    table[unevaluated] = np.nan
    after_aggregation = table[:everyone, :width]
    after_training = table[:everyone, width : 2 * width]
    judged = after_aggregation
    if federation.algorithm.evaluate_on == "after_training":
        # by the NaN predictions: a loss may be nan, and the accuracy where there are no classes
        judged = np.where(np.isnan(after_training[:, 2:3]), after_aggregation, after_training)
    accuracy, loss, nan, *metrics = judged.T
    columns = accuracy, loss, after_aggregation[:, 0], after_training[:, 0], *metrics
    consensus = [table[:everyone, -1]] if federation.matrix else []
    return Scores(
        dict(zip(federation.score_names, (*columns, *consensus), strict=True)),
        nan,
        dict(zip(STAGES, table[everyone:].T, strict=False)),
    )
