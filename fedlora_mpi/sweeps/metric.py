"""The metric of a search: which way is better, and whether the log of a run will have it."""

from collections.abc import Sequence

from ..analysis.scores import better_direction
from ..config import Config
from ..core.losses import LOSSES
from ..engine.metrics import METRICS
from .grid import Job

COLUMNS = (  # of the rounds of every log
    *("train_loss", "accuracy", "accuracy_aggregated", "accuracy_trained", "accuracy_worst"),
    *("loss", "nan_predictions", "clients", "drift", "bytes_up", "bytes_down", "bytes_mpi"),
    *("flops", "seconds_train", "seconds_exchange", "seconds_evaluate"),
)


def metric_direction(metric: str) -> str:
    """Return whether a column of the log is better high or low. Raises ValueError if unknown."""
    if direction := better_direction(metric):
        return direction
    raise ValueError(f"--metric = {metric}: give --direction maximize or minimize")


def check_metric(metric: str, jobs: Sequence[Job]) -> None:
    """Raise ValueError if the log of a run will not have the metric, or only NaN in its place."""
    for config in (job.config for job in jobs):
        scores = ("loss", *config.evaluate.metrics)
        loss = LOSSES.get(config.model.loss)  # None: a user's own, which may be of classes
        if metric.startswith("accuracy") and loss and loss.targets != "classes":
            raise ValueError(
                f"--metric = {metric}: is NaN with model.loss = {config.model.loss}, which has no "
                f"classes; choose --metric {' or '.join(scores)}"
            )
        if metric not in (columns := _log_columns(config)):
            way_out = (
                f"add it to evaluate.metrics: [{', '.join((*config.evaluate.metrics, metric))}]"
                if metric in METRICS
                else f"there are {', '.join(columns)}"
            )
            raise ValueError(f"--metric = {metric}: the log will have no such column; {way_out}")


def _log_columns(config: Config) -> tuple[str, ...]:
    epsilon = ("epsilon",) if config.privacy.is_differential else ()
    skipped = ("skipped",) if config.faults.non_finite == "skip" else ()
    consensus = ("consensus_distance",) if config.topology else ()
    metrics = *config.evaluate.metrics, *config.algorithm.metrics
    return (*COLUMNS, *metrics, *epsilon, *skipped, *consensus)
