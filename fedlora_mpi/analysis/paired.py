"""Compare settings on the same seeds and clients: mean difference, bootstrap interval, Wilcoxon."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .groups import Group, RunLog
from .scores import describe_directions

_LEVEL = 0.95  # of the interval
_NO_WIDTH = 1e-6  # of an interval; the log has accuracies as float32
_MIN_PAIRS = 6  # with fewer, the Wilcoxon p is above 0.05 even if all signs are equal
_RESAMPLES, _MAX_DRAWS = 4000, 8_000_000  # fewer resamples of very many clients
_SHOWN_MISSING = 10  # runs of a sweep that are not done
_HEADER = ("setting", "against", "difference", "95 % interval", "Wilcoxon p", "seeds", "clients")


class Comparison(NamedTuple):
    """The best setting of a task against another, in final accuracy (fractions).

    seeds, clients: how many pairs there are; 0 if the two share no seed, split and round.
    difference: mean over clients and seeds. interval: of this mean, by the bootstrap. p: of the
    Wilcoxon signed-rank test over the clients; NaN without scipy. pairs: the number of differences,
    one for each seed and client.
    """

    leader: Group
    rival: Group
    seeds: int
    clients: int
    difference: float = np.nan
    interval: tuple[float, float] = (np.nan, np.nan)
    p: float = np.nan
    pairs: int = 0

    @property
    def doubt(self) -> str:
        """Why the leader is not known to be better; "" if the interval shows that it is."""
        low, high = self.interval
        if not self.seeds:
            return "no pair of runs"
        if not low > 0:
            return "the interval includes zero"
        if self.pairs < _MIN_PAIRS:
            return f"only {self.pairs} pairs of seed and client; at least {_MIN_PAIRS} are needed"
        if high - low < _NO_WIDTH:
            return "all differences are equal, so the interval has no width"
        return ""


def compare_leaders(groups: Sequence[Group]) -> list[Comparison]:
    """Compare the setting with the highest mean of each task with every other one.

    A setting with a run that is not done takes no part.
    """
    comparisons = []
    finished = [group for group in groups if all(map(_is_finished, group.runs))]
    for task in dict.fromkeys(group.task for group in finished):
        ranked = sorted(
            (group for group in finished if group.task == task),
            key=lambda group: -group.seed_stat(lambda run: run.final).mean,
        )
        comparisons += [compare(ranked[0], rival) for rival in ranked[1:]]
    return comparisons


def compare(leader: Group, rival: Group) -> Comparison:
    """Compare two settings on the seeds, splits and clients that both have."""
    pairs = list(paired_runs(leader, rival))
    rows = [a.client_accuracy - b.client_accuracy for a, b in pairs]
    if not pairs:
        return Comparison(leader, rival, 0, 0)
    has_one_split = len({a.partition.get("digest") for a, _ in pairs}) == 1
    if has_one_split:
        is_known = ~np.isnan(rows).any(axis=0)
        rows = [row[is_known] for row in rows]
    else:
        rows = [row[~np.isnan(row)] for row in rows]
    if not all(map(len, rows)):
        return Comparison(leader, rival, 0, 0)
    by_client = np.mean(rows, axis=0) if has_one_split else np.concatenate(rows)
    return Comparison(
        leader,
        rival,
        len(rows),
        len(by_client),
        float(np.mean([row.mean() for row in rows])),
        bootstrap_interval(rows, has_one_split),
        wilcoxon_p(by_client),
        sum(map(len, rows)),
    )


def paired_runs(group: Group, rival: Group) -> Iterator[tuple[RunLog, RunLog]]:
    """Yield the runs of two groups with equal seeds, equal splits and equal last rounds."""
    for run in group.runs:
        for other in rival.runs:
            has_equal_split = run.partition.get("digest") == other.partition.get("digest")
            is_comparable = run.seeds == other.seeds and run.rounds_done == other.rounds_done
            has_clients = len(run.client_accuracy) == len(other.client_accuracy) > 0
            if is_comparable and has_equal_split and has_clients:
                yield run, other


def bootstrap_interval(
    differences: Sequence[np.ndarray], has_one_split: bool
) -> tuple[float, float]:
    """Return the interval of the mean of ``differences``, one array [N] for each seed.

    A resample draws the seeds, and the clients of each seed. With one split for all seeds a client
    is the same in all of them, so its differences are drawn together. (Owen, The pigeonhole
    bootstrap, Annals of Applied Statistics 2007.)
    """
    generator = np.random.default_rng(20071)
    largest = max(map(len, differences))
    resamples = max(200, min(_RESAMPLES, _MAX_DRAWS // largest))
    means = np.empty((resamples, len(differences)))
    weights = np.empty(0)
    for seed, row in enumerate(differences):
        if not (has_one_split and seed):
            uniform = np.full(len(row), 1 / len(row))
            weights = generator.multinomial(len(row), uniform, resamples) / len(row)
        means[:, seed] = weights @ row
    uniform = np.full(len(differences), 1 / len(differences))
    seed_weights = generator.multinomial(len(differences), uniform, resamples) / len(differences)
    low, high = np.quantile(
        (seed_weights * means).sum(axis=1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]
    )
    return float(low), float(high)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Return the p-value of the Wilcoxon signed-rank test, two-sided; NaN without scipy."""
    if not differences.any():
        return 1.0
    try:
        from scipy.stats import wilcoxon
    except ImportError:
        return np.nan
    return float(wilcoxon(differences).pvalue)


def missing_accuracy_line(groups: Sequence[Group]) -> str:
    """Say that several settings have scores but no accuracy to compare; "" if that is not so."""
    runs = [run for group in groups for run in group.runs]
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    if len(groups) < 2 or not names or any(len(run.evaluated_rows) for run in runs):
        return ""
    return (
        "no paired comparison: the targets are no classes, so there is no accuracy; compare "
        f"{describe_directions(names)}"
    )


def winner_lines(
    comparisons: Sequence[Comparison], runs_are_missing: bool = False
) -> Iterator[str]:
    """Yield a line for each task: its winner, or why there is none.

    runs_are_missing: no winner is named.
    """
    for leader in dict.fromkeys(comparison.leader for comparison in comparisons):
        own = [comparison for comparison in comparisons if comparison.leader is leader]
        task_note = f" ({leader.task})" if leader.task else ""
        doubtful = [comparison for comparison in own if comparison.doubt]
        if runs_are_missing:
            line = f"no winner{task_note}: {leader.label} is highest so far, but runs are missing"
        elif doubtful:
            rival = doubtful[0]
            others = f" and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
            line = (
                f"no winner{task_note}: {leader.label} is highest, but not told apart from "
                f"{rival.rival.label}{others} ({rival.doubt})"
            )
        else:
            line = f"winner{task_note}: {leader.label}; every interval excludes zero"
            if any(comparison.seeds == 1 for comparison in own):
                line += "; with one seed this says nothing about other seeds"
        yield "; ".join([line, *_seed_notes(own)])


def _seed_notes(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield a note for each rival that lacks seeds of the leader."""
    for comparison in comparisons:
        if len(comparison.rival.runs) < (wanted := len(comparison.leader.runs)):
            yield f"{comparison.rival.label} has {comparison.seeds} of its {wanted} seeds"


def missing_runs_lines(
    wanted_of_sweep: Mapping[Path, Sequence[Path]], runs: Sequence[RunLog]
) -> Iterator[str]:
    """Yield a line for each sweep with runs that are not done.

    wanted_of_sweep: {folder of a sweep: its run folders}. runs: those that have begun.
    """
    done = {run.path.resolve() for run in runs if run.rounds_done >= run.config["rounds"]}
    for folder, paths in wanted_of_sweep.items():
        missing = [str(path.relative_to(folder)) for path in paths if path.resolve() not in done]
        if missing:
            names = "; ".join(missing[:_SHOWN_MISSING])
            others = len(missing) - _SHOWN_MISSING
            yield (
                f"{folder}: {len(paths) - len(missing)} of {len(paths)} runs done; missing: {names}"
                + (f" and {others} more" if others > 0 else "")
            )


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return the comparisons as rows of text, in percentage points, after a heading."""
    return [
        _HEADER,
        *(
            (
                comparison.leader.label,
                comparison.rival.label,
                *_number_texts(comparison),
                str(comparison.seeds),
                str(comparison.clients),
            )
            for comparison in comparisons
        ),
    ]


def _number_texts(comparison: Comparison) -> tuple[str, str, str]:
    if not comparison.seeds:
        return "-", "-", "-"
    low, high = comparison.interval
    p = "-" if np.isnan(comparison.p) else f"{comparison.p:.2g}"
    return (
        f"{100 * comparison.difference:+.2f}",
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        p,
    )


def _is_finished(run: RunLog) -> bool:
    return run.rounds_done >= run.config["rounds"] and len(run.evaluated_rows) > 0
