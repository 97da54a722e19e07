"""Measure how the seconds of a run are spread over its ranks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

BUSY = ("train", "evaluate")  # stages in which a rank works for its own clients


class RankLoad(NamedTuple):
    """The load of each rank, over the rounds in which the rank was present."""

    seconds: dict[str, np.ndarray]  # stage -> [R] per round; the stages add up to the whole time
    # the workers' mean busy time divided by that of the busiest worker; NaN for fewer than two
    balance: float
    first_worker: int = 0  # the ranks before it host no clients

    def worker_seconds(self) -> "WorkerSeconds":
        """Return the seconds of the median and of the slowest worker."""
        workers = {stage: column[self.first_worker :] for stage, column in self.seconds.items()}
        order = np.argsort(sum(workers[stage] for stage in BUSY), kind="stable")
        middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
        return WorkerSeconds(
            len(order),
            {stage: float(column[middle].mean()) for stage, column in workers.items()},
            {stage: float(column[order[-1]]) for stage, column in workers.items()},
        )


class WorkerSeconds(NamedTuple):
    """Seconds of a round by stage, of the ranks that host clients, ordered by their busy time.

    median: of the worker in the middle, or the mean of the two there. slowest: of the last one.
    """

    workers: int  # 0: the run did not measure its ranks, and the seconds are those of rank 0
    median: dict[str, float]
    slowest: dict[str, float]


def measure_load(
    ranks: Mapping[str, np.ndarray], config: Mapping[str, Any], rows: slice = slice(None)
) -> RankLoad | None:
    """Return the load from the columns of ``/ranks`` and the run's config, over some rows.

    A row covers the rounds since the measured row before it, at most ``evaluate.every``. Returns
    None if the rows have no measurement.
    """
    numbers = ranks.get("ranks", np.zeros(0, int))
    measured = np.flatnonzero(numbers)
    if not len(measured):
        return None
    covered = np.minimum(np.diff(measured, prepend=-1), config.get("evaluate", {}).get("every", 1))
    is_selected = np.isin(measured, np.arange(len(numbers))[rows])
    measured, covered = measured[is_selected], covered[is_selected]
    if not len(measured):
        return None
    stages = {
        n.removeprefix("seconds_"): column[measured].astype(float)
        for n, column in ranks.items()
        if n != "ranks"
    }
    is_present = ~np.isnan(next(iter(stages.values())))  # [rows, R]
    rounds_present = covered @ is_present
    has_rounds = rounds_present > 0  # other columns are of ranks that these rows do not have
    seconds = {
        n: np.nansum(column, axis=0)[has_rounds] / rounds_present[has_rounds]
        for n, column in stages.items()
    }
    busy = sum((stages[name] for name in BUSY), np.zeros(is_present.shape))
    servers = 0 if config.get("server_hosts_clients") or numbers.max() == 1 else 1
    workers = [row[servers:number] for row, number in zip(busy, numbers[measured], strict=True)]
    workers = [row for row in workers if len(row) > 1 and row.max() > 0]
    slowest = sum(row.max() for row in workers)
    balance = float(sum(row.mean() for row in workers) / slowest) if workers else float("nan")
    return RankLoad(seconds, balance, servers)
