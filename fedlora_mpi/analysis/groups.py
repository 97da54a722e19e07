"""Group runs that differ only in their seeds, and give each group a label of its own."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..store.reader import RunFiles
from .load import RankLoad, WorkerSeconds, measure_load
from .method_names import paper_name
from .scores import final_scores

SEED_KEYS = ("seed", "data.partition.seed")
# Beginnings of the dotted names of settings that change at most the last bits of a result.
IGNORED_KEYS = (
    *SEED_KEYS, "output", "checkpoint.", "log.", "data.root", "data.download",
    "server_hosts_clients", "mix", "uplink",
    "engine.device", "engine.path", "engine.group_size", "engine.threads", "engine.graphs",
    "engine.personal",
)  # fmt: skip
# {block: the key that decides what the block's other keys mean}
SELECTORS = {"data.partition": "kind", "model": "name", "algorithm": "name", "topology": "name"}
# Beginnings of the dotted names of the settings that results must share to be compared.
_TASK_KEYS = ("data.", "participation")
# {beginning of dotted names in the ``data`` block: the data sets that read these settings}
DATASETS_OF_BLOCK = {
    "data.synthetic.": ("synthetic",),
    "data.text.": ("ag_news", "csv"),
    "data.table.": ("table",),
}
_METHOD_KEY, _DATASET_KEY = "algorithm.name", "data.dataset"
# keys of which a label shows only the value
_KEYS_SHOWN_AS_VALUE = ("model.name", "data.partition.kind", "topology.name", _DATASET_KEY)


class Stat(NamedTuple):
    """Mean and sample standard deviation over seeds. NaN if unknown, as the std of one seed."""

    mean: float
    std: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Stat":
        """Return the Stat of those ``values`` that are not NaN."""
        known = np.array([value for value in values if not np.isnan(value)])
        return cls(
            float(known.mean()) if len(known) else np.nan,
            float(known.std(ddof=1)) if len(known) > 1 else np.nan,
        )


@dataclass(frozen=True, eq=False)
class RunLog:
    """The content of a run's log, read once. Accuracies are fractions."""

    path: Path
    config: dict[str, Any]
    rounds: dict[str, np.ndarray]  # [T]
    clients: dict[str, np.ndarray]  # [T, N]
    partition: dict[str, Any]
    ranks: dict[str, np.ndarray] = field(default_factory=dict)  # [T, R]; "ranks" [T]: their number
    spectral_gap: float | None = None  # of its topology, if it has one

    @classmethod
    def read(cls, path: Path) -> "RunLog":
        """Read the log. Raises StoreError (a ValueError) if ``path`` is no run folder."""
        files = RunFiles(path)
        rows = files.require_columns()
        return cls(
            Path(path),
            files.checked_config,
            rows["rounds"],
            rows["clients"],
            files.partition(),
            rows["ranks"],
            files.spectral_gap,
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """{dotted key: value} of every setting that may change a result, except the seeds."""
        return effective_settings(self.config)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the run and of the partition."""
        config = dict(flatten_config(self.config))
        return tuple(config[key] for key in SEED_KEYS)

    @cached_property
    def rank_load(self) -> RankLoad | None:
        """The seconds of each rank; None if the run did not measure them."""
        return measure_load(self.ranks, self.config)

    @cached_property
    def worker_seconds(self) -> WorkerSeconds:
        """The seconds of a round on the ranks that train; of rank 0 if ranks were not measured."""
        if self.rank_load:
            return self.rank_load.worker_seconds()
        names = [name for name in self.rounds if name.startswith("seconds_")]
        seconds = {n.removeprefix("seconds_"): float(self.column(n).mean()) for n in names}
        return WorkerSeconds(0, seconds, seconds)

    @property
    def total_seconds(self) -> float:
        """The seconds of all rounds, on the clock of rank 0."""
        columns = [values for n, values in self.rounds.items() if n.startswith("seconds_")]
        return float(sum(column.sum() for column in columns))

    @property
    def topology(self) -> str:
        """The name of its topology in the config; "" without one."""
        return dict(flatten_config(self.config)).get("topology.name", "")

    @property
    def neighbours(self) -> list[list[int]]:
        """The neighbours of each client; [] without a topology."""
        return [clients.tolist() for clients in self.partition.get("neighbours", [])]

    @property
    def algorithm(self) -> str:
        """The name of the method in the config."""
        return self.config["algorithm"]["name"]

    @property
    def num_clients(self) -> int:
        """The number of clients."""
        return next(iter(self.clients.values())).shape[1]

    @property
    def rounds_done(self) -> int:
        """The number of the last logged round; 0 if there is none."""
        return int(self.rounds["round"][-1]) if len(self.rounds["round"]) else 0

    @cached_property
    def evaluated_rows(self) -> np.ndarray:
        """The rows of the rounds with evaluation."""
        return np.flatnonzero(~np.isnan(self.column("accuracy")))

    @cached_property
    def scores(self) -> dict[str, float]:
        """Scores beside the accuracy, in the last evaluated round; {} before it."""
        finals = final_scores(self.config, self.rounds)
        return {name: value for name, value in finals.items() if not np.isnan(value)}

    def column(self, name: str) -> np.ndarray:
        """Return the column ``name`` of the rounds, [T]; all NaN if the log does not have it."""
        return self.rounds.get(name, np.full(len(self.rounds["round"]), np.nan))

    @cached_property
    def best_row(self) -> int:
        """The first row with the highest accuracy. Needs at least one evaluated round."""
        return int(self.evaluated_rows[self.column("accuracy")[self.evaluated_rows].argmax()])

    @property
    def final(self) -> float:
        """Accuracy in the last evaluated round; NaN without one."""
        return (
            float(self.column("accuracy")[self.evaluated_rows[-1]])
            if len(self.evaluated_rows)
            else np.nan
        )

    @property
    def best(self) -> float:
        """The highest accuracy of any round; NaN without an evaluated round."""
        return float(self.column("accuracy")[self.best_row]) if len(self.evaluated_rows) else np.nan

    @property
    def client_accuracy(self) -> np.ndarray:
        """[N] accuracy of each client's own model in the last evaluated round; [0] without one."""
        return (
            self.clients["accuracy"][self.evaluated_rows[-1]].astype(float)
            if len(self.evaluated_rows)
            else np.zeros(0)
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings, one for each pair of seeds (of the run and the partition).

    settings: the settings that differ between the groups.
    """

    label: str
    settings: dict[str, Any]
    runs: tuple[RunLog, ...]

    @property
    def task(self) -> str:
        """The settings of data and participation that differ between groups, as text.

        Results of groups with the same task are comparable.
        """
        task_settings = {
            key: value for key, value in self.settings.items() if key.startswith(_TASK_KEYS)
        }
        return ", ".join(
            _describe_setting(key, value, sorted(task_settings))
            for key, value in task_settings.items()
        )

    def seed_stat(self, metric) -> Stat:
        """Return mean and standard deviation of ``metric(run)`` over the seeds."""
        return Stat.from_values([metric(run) for run in self.runs])

    def worker_seconds(self) -> WorkerSeconds:
        """Return the seconds of a round on the ranks that train, mean over the seeds."""
        runs = [run.worker_seconds for run in self.runs]

        def mean_of(seconds: Sequence[dict[str, float]]) -> dict[str, float]:
            stages = dict.fromkeys(stage for of_run in seconds for stage in of_run)
            values = {s: [of_run.get(s, np.nan) for of_run in seconds] for s in stages}
            return {stage: Stat.from_values(of_runs).mean for stage, of_runs in values.items()}

        return WorkerSeconds(
            max(run.workers for run in runs),
            mean_of([run.median for run in runs]),
            mean_of([run.slowest for run in runs]),
        )

    @cached_property
    def rounds(self) -> np.ndarray:
        """[T] The rounds that all runs of the group have."""
        return common_values([run.rounds["round"] for run in self.runs])

    def curves(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (rounds [T], column [seeds, T]) for the rounds in which no run is NaN."""
        rows = [np.isin(run.rounds["round"], self.rounds) for run in self.runs]
        values = np.stack(
            [run.column(name)[run_rows] for run, run_rows in zip(self.runs, rows, strict=True)]
        ).astype(float)
        is_known = ~np.isnan(values).any(0)
        return self.rounds[is_known], values[:, is_known]

    def client_curves(self, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return (rounds [T], the clients' column [T, N] of each run).

        The rounds are those of ``curves('accuracy')``.
        """
        rounds = self.curves("accuracy")[0]
        return rounds, [
            run.clients[name][np.isin(run.rounds["round"], rounds)] for run in self.runs
        ]


def count_seeds(groups: Sequence[Group]) -> str:
    """Return how many seeds the groups have, such as "3 seeds" or "1 to 3 seeds"."""
    return format_counts([len(group.runs) for group in groups], "seed")


def count_clients(groups: Sequence[Group]) -> str:
    """Return how many clients the groups have, such as "12 clients" or "7 to 12 clients"."""
    return format_counts([run.num_clients for group in groups for run in group.runs], "client")


def format_counts(counts: Sequence[int], noun: str) -> str:
    """Return the range of ``counts`` with its noun, such as "1 run" or "2 to 3 runs"."""
    text = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"{text} {noun}{'' if max(counts) == 1 else 's'}"


class RunGroups(NamedTuple):
    """The groups of some runs.

    groups: in the order of their first runs.
    keys: dotted names of the settings that differ between the groups.
    left_out: (run left out, run kept) for runs with equal settings and seeds.
    """

    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    left_out: tuple[tuple[RunLog, RunLog], ...]


def group_runs(runs: Sequence[RunLog]) -> RunGroups:
    """Group the runs by their settings.

    Of two runs with equal settings and seeds, the longer one is kept, or the first of equal length.
    """
    by_setting: dict[str, dict[tuple[int, ...], RunLog]] = {}
    left_out = []
    for run in runs:
        seeds = by_setting.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if (previous := seeds.get(run.seeds)) is None:
            seeds[run.seeds] = run
            continue
        longer, dropped = (
            (previous, run) if previous.rounds_done >= run.rounds_done else (run, previous)
        )
        seeds[run.seeds] = longer
        left_out.append((dropped, longer))
    members = [tuple(seeds.values()) for seeds in by_setting.values()]
    settings = [group[0].settings for group in members]
    keys = differing_keys(settings)
    groups = (
        Group(label, {key: group_settings[key] for key in keys if key in group_settings}, found)
        for label, group_settings, found in zip(
            group_labels(settings), settings, members, strict=True
        )
    )
    return RunGroups(tuple(groups), keys, tuple(left_out))


def effective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} of every setting that may change a result, except the seeds."""
    dataset = config["data"].get("dataset")
    unused = tuple(block for block, users in DATASETS_OF_BLOCK.items() if dataset not in users)
    return {
        key: value
        for key, value in flatten_config(config)
        if not key.startswith((*IGNORED_KEYS, *unused))
    }


def run_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the label of each run; runs that differ only in their seeds have the same label."""
    settings = [effective_settings(config) for config in configs]
    texts = [_to_json(one) for one in settings]
    distinct = dict(zip(texts, settings, strict=True))
    label_of = dict(zip(distinct, group_labels(list(distinct.values())), strict=True))
    return [label_of[text] for text in texts]


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the keys whose values differ between ``settings``.

    A selector, such as ``algorithm.name``, decides what the other keys of its block mean. So these
    keys (``algorithm.lora_epochs``) are compared only between settings with the same selector.
    """
    keys = []
    for key in _ordered_keys(settings):
        values: dict[str, set[str]] = {}
        for group_settings in settings:
            values.setdefault(_selector_value(group_settings, key), set()).add(
                _to_json(group_settings.get(key))
            )
        if any(len(texts) > 1 for texts in values.values()):
            keys.append(key)
    return tuple(keys)


def group_labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each of ``settings``: its method, and every setting that differs.

    The method is first, then the data, then the rest. Runs on several data sets are compared per
    data set: what differs only between data sets, such as the number of rounds, is left out. A
    setting that only some methods have is only in their labels. No two labels are equal.
    """
    num_with_name = Counter(map(paper_name, {str(values.get(_METHOD_KEY)) for values in settings}))
    keys_of: dict[str, list[str]] = {}  # data set -> keys that differ, without the method's name
    for dataset in {str(values.get(_DATASET_KEY)) for values in settings}:
        rivals = [values for values in settings if str(values.get(_DATASET_KEY)) == dataset]
        keys_of[dataset] = [key for key in differing_keys(rivals) if key != _METHOD_KEY]
    if len(keys_of) > 1:
        keys_of = {dataset: [_DATASET_KEY, *keys] for dataset, keys in keys_of.items()}
    all_keys = sorted({key for keys in keys_of.values() for key in keys})

    def describe(values: Mapping[str, Any]) -> str:
        method = str(values.get(_METHOD_KEY))
        is_unique = num_with_name[paper_name(method)] == 1
        # a network has a name, or else a mix has networks
        keys = [
            k for k in keys_of[str(values.get(_DATASET_KEY))] if k in values or k == "model.name"
        ]
        parts = [_describe_setting(key, values.get(key), all_keys) for key in keys]
        return ", ".join([paper_name(method) if is_unique else method, *parts])

    labels = [describe(values) for values in settings]
    # what a label shortens may be all that differs, such as the options of a network in a mix
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    return [
        f"{label} ({number})" if label in repeated else label
        for number, label in enumerate(labels, 1)
    ]


def short_key(key: str, keys: Sequence[str]) -> str:
    """Return the last word of a dotted key; its last two if another of ``keys`` ends the same.

    A last word ``name`` or ``kind`` always comes with the word before it.
    """
    words = key.split(".")
    is_unique = sum(candidate.split(".")[-1] == words[-1] for candidate in keys) < 2 and words[
        -1
    ] not in ("name", "kind")
    return words[-1] if is_unique else ".".join(words[-2:])


def format_setting(value: Any) -> str:
    """Return the value of a setting as readable text."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, dict) and "name" in value:  # a network of a mix
        return str(value["name"])
    if isinstance(value, list):
        return f"[{', '.join(map(format_setting, value))}]"
    words = {"null": "none", "true": "yes", "false": "no"}
    return words.get(_to_json(value), str(value))


def is_number(value: Any) -> bool:
    """Return whether the value of a setting is a number. A boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten_config(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a config with its value."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_config(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def common_values(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the values that all arrays contain."""
    common = arrays[0]
    for array in arrays[1:]:
        common = np.intersect1d(common, array)
    return common


def _ordered_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all keys of ``settings`` in the order of a label.

    The method's name is first, then the data set, then other data settings, then the rest. Within
    these parts, selectors are first.
    """
    keys = list(dict.fromkeys(key for group_settings in settings for key in group_settings))
    selectors = {f"{block}.{name}" for block, name in SELECTORS.items()}
    return sorted(
        keys,
        key=lambda key: (
            key != _METHOD_KEY,
            key != _DATASET_KEY,
            not key.startswith("data."),
            key not in selectors,
        ),
    )


def _selector_value(settings: Mapping[str, Any], key: str) -> str:
    """Return the value, as JSON, of the selector of the key's block; "" if there is none."""
    block = next((block for block in SELECTORS if key.startswith(f"{block}.")), None)
    return (
        ""
        if block is None or key == f"{block}.{SELECTORS[block]}"
        else _to_json(settings.get(f"{block}.{SELECTORS[block]}"))
    )


def _describe_setting(key: str, value: Any, shown_keys: Sequence[str]) -> str:
    """Return the text of a setting in a label."""
    if key == "model.name" and value is None:
        return "mix"
    return (
        format_setting(value)
        if key in _KEYS_SHOWN_AS_VALUE
        else f"{short_key(key, shown_keys)} {format_setting(value)}"
    )


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
