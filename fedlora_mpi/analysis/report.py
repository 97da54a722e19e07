"""Format the results of runs as a text table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from ..core.escapes import escape_line
from ..core.units import format_bytes
from ..store.reader import RunFiles
from .groups import RunLog, group_runs, run_labels
from .paired import (
    compare_leaders,
    comparison_rows,
    missing_accuracy_line,
    missing_runs_lines,
    winner_lines,
)
from .scores import final_scores

_HEADER = (
    "method",
    "rounds",
    "seed",
    "final",
    "best",
    "worst client",
    "up/client",
    "s/round",
    "run",
)
_SEED_KEYS = ("seed", "data.partition.seed")
_IGNORED_KEYS = (
    "rounds",
    "output",
    "checkpoint",
    "log",
    "server_hosts_clients",
    "data.root",
    "data.download",
)


def table(runs: Sequence[Path]) -> str:
    """Return a table with one row per run, then one row per setting with several seeds.

    method: its name, and every setting that differs between the runs. final, worst client: accuracy
    in the last evaluated round, mean and minimum over the clients. best: the highest mean of any
    round, and that round. up/client: bytes per client and round. A run with further scores adds
    columns for them, of the last evaluated round. A row over seeds has means with sample standard
    deviations. The topologies of runs, and what is doubtful about their settings, follow the table.
    """
    run_files = [RunFiles(path) for path in runs]
    labels = run_labels([files.checked_config for files in run_files])
    results = [_Result.read(*labelled) for labelled in zip(run_files, labels, strict=True)]
    rows: list[Sequence[str]] = [_HEADER]
    rows += [result.table_row() for result in results]
    rows += _seed_rows(results)
    rows = _with_scores(rows, list(dict.fromkeys(n for r in results for n in r.scores)), results)
    hints = [escape_line(f"{r.path}: {hint}") for r in results for hint in r.hints]
    graphs = [escape_line(f"{r.path}: {r.graph}") for r in results if r.graph]
    return "\n".join([align_columns(rows, left=(0, len(rows[0]) - 1)), *graphs, *hints])


def comparison_text(runs: Sequence[Path], wanted_of_sweep: Mapping[Path, Sequence[Path]]) -> str:
    """Return the comparison of the best setting with every other one, and who wins, in lines.

    wanted_of_sweep: {folder of a sweep: its run folders}; a line names those that are not done.
    "" if there is nothing to say; a line says so if there is no accuracy to compare.
    """
    logs = [RunLog.read(path) for path in runs]
    missing = [escape_line(line) for line in missing_runs_lines(wanted_of_sweep, logs)]
    groups = group_runs(logs).groups
    comparisons = compare_leaders(groups)
    if not comparisons:
        line = missing_accuracy_line(groups)
        return "\n".join([*missing, *([f"\n{line}"] if line else [])])
    title = "\nfinal accuracy in points, paired by seed and client:"
    rows = align_columns(comparison_rows(comparisons), left=(0, 1))
    winners = map(escape_line, winner_lines(comparisons, bool(missing)))
    return "\n".join([title, rows, *missing, *winners])


def align_columns(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Return rows of cells as lines with aligned columns.

    The columns ``left`` are aligned to the left, the others to the right. Cells are escaped, so
    they may hold untrusted text.
    """
    rows = [[escape_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if column in left else ">" for column in range(len(widths))]
    lines = (
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class _Result:
    """The numbers of one run."""

    path: Path
    label: str
    seeds: tuple[int, ...]  # of the run and of the partition
    setting: str  # equal for runs that differ in their seeds only
    rounds_done: int
    rounds_wanted: int
    best_round: int | None
    hints: tuple[str, ...]  # what is doubtful about its settings
    numbers: np.ndarray  # [5] final, best, worst (fractions), bytes up, seconds; NaN where unknown
    scores: dict[str, float]  # further ones, in the last evaluated round
    graph: str  # its topology in words; "" without one

    @classmethod
    def read(cls, files: RunFiles, label: str) -> "_Result":
        config: Any = files.checked_config
        required = ("bytes_up", "clients", "accuracy", "accuracy_worst")
        rounds = files.require_columns(*required)["rounds"]
        num_rounds = len(rounds["round"])
        numbers, best_round = np.full(5, np.nan), None
        if num_rounds:
            seconds = sum(
                column.sum() for name, column in rounds.items() if name.startswith("seconds_")
            )
            numbers[3:] = rounds["bytes_up"].sum() / rounds["clients"].sum(), seconds / num_rounds
            evaluated = np.flatnonzero(~np.isnan(rounds["accuracy"]))
            if len(evaluated):
                accuracy = rounds["accuracy"][evaluated]
                best_round = int(rounds["round"][evaluated[accuracy.argmax()]])
                numbers[:3] = accuracy[-1], accuracy.max(), rounds["accuracy_worst"][evaluated[-1]]
        return cls(
            path=files.path,
            label=label,
            seeds=tuple(reduce(getitem, key.split("."), config) for key in _SEED_KEYS),
            setting=(
                f"{_settings_without(config, (*_SEED_KEYS, *_IGNORED_KEYS))} "
                f"after {num_rounds} rounds"
            ),
            rounds_done=num_rounds,
            rounds_wanted=config["rounds"],
            best_round=best_round,
            hints=tuple(files.hints),
            numbers=numbers,
            scores=final_scores(config, rounds),
            graph=_describe_graph(files, rounds),
        )

    def table_row(self) -> tuple[str, ...]:
        rounds = (
            f"{self.rounds_done}"
            if self.rounds_done >= self.rounds_wanted
            else f"{self.rounds_done}/{self.rounds_wanted}"
        )
        final, best, worst, up, seconds = _format_numbers(self.numbers)
        best_suffix = f" @{self.best_round}" if self.best_round else ""
        seed = str(self.seeds[0])
        return (
            self.label,
            rounds,
            seed,
            final,
            f"{best}{best_suffix}",
            worst,
            up,
            seconds,
            str(self.path),
        )


def _describe_graph(files: RunFiles, rounds: Mapping[str, np.ndarray]) -> str:
    """The topology of a run, its spectral gap and the last consensus distance; "" without one."""
    if files.spectral_gap is None:
        return ""
    name = files.config.get("topology", {}).get("name", "file")
    text = f"topology {name}, spectral gap {files.spectral_gap:.3g}"
    known = rounds.get("consensus_distance", np.zeros(0))
    known = known[~np.isnan(known)]
    return f"{text}, final consensus distance {known[-1]:.3g}" if len(known) else text


def _with_scores(
    rows: Sequence[Sequence[str]], names: Sequence[str], results: Sequence[_Result]
) -> list[Sequence[str]]:
    """The header, the rows of runs and the rows over seeds, with a column for each of ``names``
    after the worst client.
    """
    at = _HEADER.index("up/client")
    table = np.array([[r.scores.get(n, np.nan) for n in names] for r in results])
    numbers = [table[[row]] for row in range(len(results))]
    numbers += [table[members] for members in _seed_groups(results)]
    cells = [list(names), *([_format_score(v) for v in scores.T] for scores in numbers)]
    return [[*row[:at], *extra, *row[at:]] for row, extra in zip(rows, cells, strict=True)]


def _format_score(values: np.ndarray) -> str:
    """A score of one run, or its mean and sample standard deviation over several."""
    if np.isnan(values.mean()):
        return "-"
    spread = f" ±{values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{spread}"


def _seed_groups(results: Sequence[_Result]) -> list[list[int]]:
    """The numbers of the runs of each setting with more than one seed."""
    settings: dict[str, list[int]] = {}
    for number, result in enumerate(results):
        settings.setdefault(result.setting, []).append(number)
    return [m for m in settings.values() if len({results[n].seeds for n in m}) > 1]


def _seed_rows(results: Sequence[_Result]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each setting with more than one seed."""
    for group in _seed_groups(results):
        members = [results[number] for number in group]
        seeds = {result.seeds for result in members}
        numbers = np.stack([result.numbers for result in members])
        *means, up, seconds = _format_numbers(numbers.mean(0))
        stds = 100 * numbers.std(0, ddof=1)[:3]
        spread = [
            mean if mean == "-" else f"{mean} ±{std:5.2f}"
            for mean, std in zip(means, stds, strict=True)
        ]
        runs = f"mean ± std of {len(members)} runs"
        yield (
            members[0].label,
            str(members[0].rounds_done),
            f"{len(seeds)} seeds",
            *spread,
            up,
            seconds,
            runs,
        )


def _settings_without(config: dict[str, Any], keys: Sequence[str]) -> str:
    """Return the config as JSON text, without the dotted ``keys``."""
    tree = deepcopy(config)
    for key in keys:
        *blocks, name = key.split(".")
        reduce(getitem, blocks, tree).pop(name, None)
    return json.dumps(tree, sort_keys=True)


def _format_numbers(numbers: np.ndarray) -> list[str]:
    """Return ``_Result.numbers`` as readable text; "-" for NaN."""
    formats = [lambda fraction: f"{fraction:.2%}"] * 3 + [
        format_bytes,
        lambda seconds: f"{seconds:.3g}",
    ]
    return [
        "-" if np.isnan(number) else to_text(number)
        for to_text, number in zip(formats, numbers, strict=True)
    ]
