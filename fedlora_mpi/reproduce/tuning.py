"""The learning rate of each method of a table with a ``Tuning``: trials, and what they choose."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf, isnan

from .grid import Case, Entry, Job, Score, Tuning
from .results import ResultStore

Rates = dict[tuple[Case, str], float]  # (case, key of the entry) -> learning rate


def trial_entries(entries: Iterable[Entry], tuning: Tuning) -> Iterator[Entry]:
    """Each entry with each learning rate. A trial that diverges is the worst one, not a failure."""
    for entry in entries:
        for lr in tuning.rates:
            yield replace(entry, key=_trial_key(entry.key, lr), lr=lr, non_finite="skip")


def choose_rates(trials: Sequence[Job], store: ResultStore, score: Score) -> Rates:
    """The best learning rate of each method of each case.

    It is the one with the best ``score`` in the last rounds, the lower one of two equal ones. The
    worst score is NaN, or that of a trial that has diverged. Trials that are not finished do not
    take part.
    """
    best: dict[tuple[Case, str], tuple[float, float]] = {}
    for job in trials:
        lr, result = job.entry.lr, store.result(job)
        if result is None or lr is None:
            continue
        place = (job.case, job.entry.key.removesuffix(_trial_key("", lr)))
        late = result.late(score) * (1 if score.higher_is_better else -1)
        candidate = (-inf if isnan(late) or result.has_diverged else late, -lr)
        best[place] = max(best.get(place, candidate), candidate)
    return {place: -negative_lr for place, (_, negative_lr) in best.items()}


def _trial_key(key: str, lr: float) -> str:
    return f"{key}-lr{lr:g}"
