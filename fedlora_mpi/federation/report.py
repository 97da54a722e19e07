"""The figures of a round, for its row in the log."""

import numpy as np

from ..aggregation.aggregator import Received
from ..aggregation.flat_layout import estimate_nbytes, joint_dtype
from .cohorts import Cohort
from .evaluation import Scores
from .federation import Federation, State


def report(
    federation: Federation,
    state: State,
    cohort: Cohort,
    received: Received,
    metrics: dict[str, float],
    scores: Scores | None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """The row of a round and the columns [N] of its clients, equal on all ranks.

    state: before the round. ``drift``: see ``Aggregator``. ``skipped``: clients whose numbers were
    not finite. ``nan_clients``: clients that have a test sample with a NaN logit.
    ``undefined_metrics``: {metric: evaluated clients that have none}. ``seconds_ranks``
    of an evaluated round: {stage: [R] seconds since the last such round} (see ``Stopwatch``); of
    another round {}.
    """
    unknown = np.full(len(cohort.clients), np.nan)
    if scores is None:
        scores = Scores(dict.fromkeys(federation.score_names, unknown), unknown, {})
    row: dict = {
        "train_loss": received.train_loss,
        "clients": received.trained,
        "stop": received.stop,
        "drift": received.drift,
        **_traffic_bytes(federation, state, cohort, received),
        "flops": federation.instruments.flops(cohort),
        **metrics,
    }
    if federation.aggregator.skip_nonfinite:
        row["skipped"] = sorted(cohort.members - received.active)
    row["accuracy_worst"] = np.fmin.reduce(scores.columns["accuracy"])
    row |= {name: _nanmean(column) for name, column in scores.columns.items()}
    row["nan_predictions"] = _nanmean(scores.nan_predictions)
    row["nan_clients"] = np.flatnonzero(scores.nan_predictions > 0).tolist()
    if federation.metrics:
        is_evaluated = ~np.isnan(scores.nan_predictions)
        row["undefined_metrics"] = {
            name: np.flatnonzero(np.isnan(scores.columns[name]) & is_evaluated).tolist()
            for name in federation.metrics
        }
    row |= {f"seconds_{name}": t for name, t in federation.instruments.seconds.items()}
    row["seconds_ranks"] = scores.seconds
    return row, scores.columns


def _traffic_bytes(
    federation: Federation, state: State, cohort: Cohort, received: Received
) -> dict[str, int]:
    """Bytes of the round: those of a real federation, each number in its leaf's dtype, and those
    given to MPI by all ranks.
    """
    aggregator, clients, ranks = federation.aggregator, cohort.clients, federation.comm.size
    active, mixing = received.active, aggregator.mixing
    layouts = [clients[c].upload_layout for c in active]
    download_bytes = [
        t.download_nbytes(state.server, state.shared, state.round) for t in clients.types
    ]
    up = estimate_nbytes(received.numbers_sent, layouts)
    down = sum(download_bytes[clients.type_of[c]] for c in active)
    mpi_bytes = received.message_bytes * ranks
    if aggregator.gathers:
        width = joint_dtype([layout.dtype for layout in layouts]).itemsize
        mpi_bytes += width * sum(layout.size for layout in layouts)
    if mixing:
        mix_bytes = [mixing.bytes_of(client, active) for client in active]
        up += sum(sent for sent, _ in mix_bytes)
        down += sum(returned for _, returned in mix_bytes)
        mpi_bytes += mixing.bytes_mpi(active, ranks)
    return {"bytes_up": up, "bytes_down": down, "bytes_mpi": mpi_bytes if ranks > 1 else 0}


def _nanmean(column: np.ndarray) -> float:
    """Mean over the clients that have a number."""
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else float("nan")
