"""Runs that differ in their seeds only are a group; a group's label is what sets it apart from the
others.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..store.reader import RunFiles
from .load import Load, load

SEEDS = ("seed", "data.partition.seed")
# What changes no result beyond its last bits, by the beginning of its dotted name.
NO_MATTER = (
    *SEEDS, "output", "checkpoint.", "log.", "data.root", "data.download", "server_hosts_clients", "mix", "uplink",
    "engine.device", "engine.path", "engine.group_size", "engine.threads",
)  # fmt: skip
# says what a block's other keys mean
SELECTORS = {"data.partition": "kind", "model": "name", "algorithm": "name"}
# beginnings of what the experiment is, whatever the method
TASK = ("data.", "participation", "rounds")
_FIRST = "algorithm.name"
# in a label without the name of the key
_BY_VALUE = (_FIRST, "model.name", "data.partition.kind", "data.dataset")


class Stat(NamedTuple):
    """A mean over seeds and the sample standard deviation; NaN where unknown (of one seed: the
    deviation).
    """

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """That of the ``values`` that are numbers."""
        there = np.array([value for value in values if not np.isnan(value)])
        return cls(
            float(there.mean()) if len(there) else np.nan,
            float(there.std(ddof=1)) if len(there) > 1 else np.nan,
        )


@dataclass(frozen=True, eq=False)
class Logged:
    """What the log of a run holds, read once. Accuracies are fractions."""

    path: Path
    config: dict[str, Any]
    rounds: dict[str, np.ndarray]  # [T]
    clients: dict[str, np.ndarray]  # [T, N]
    partition: dict[str, Any]
    ranks: dict[str, np.ndarray] = field(default_factory=dict)  # [T, R], and how many [T]

    @classmethod
    def read(cls, path: Path) -> "Logged":
        """Raises StoreError (a ValueError) when ``path`` is no run folder."""
        files = RunFiles(path)
        rows = files.measured()
        return cls(
            Path(path),
            files.settings,
            rows["rounds"],
            rows["clients"],
            files.partition(),
            rows["ranks"],
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """{dotted key: value} of every setting that may change a result, but for the seeds."""
        return {key: value for key, value in flat(self.config) if not key.startswith(NO_MATTER)}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the run and of the partition."""
        config = dict(flat(self.config))
        return tuple(config[key] for key in SEEDS)

    @cached_property
    def load(self) -> Load | None:
        """How its seconds are spread over ranks; None where that was not measured."""
        return load(self.ranks, self.config)

    @property
    def algorithm(self) -> str:
        """Its name in the config."""
        return self.config["algorithm"]["name"]

    @property
    def done(self) -> int:
        """The last round, 0 before the first."""
        return int(self.rounds["round"][-1]) if len(self.rounds["round"]) else 0

    @cached_property
    def evaluated(self) -> np.ndarray:
        """The rows of the rounds that were evaluated."""
        return np.flatnonzero(~np.isnan(self.column("accuracy")))

    def column(self, name: str) -> np.ndarray:
        """[T] of the rounds; NaN where the log has no such column."""
        return self.rounds.get(name, np.full(len(self.rounds["round"]), np.nan))

    @cached_property
    def best_row(self) -> int:
        """The row of the highest accuracy, the first of several. Only where a round was evaluated."""
        return int(self.evaluated[self.column("accuracy")[self.evaluated].argmax()])

    @property
    def final(self) -> float:
        """Accuracy in the last evaluated round."""
        return float(self.column("accuracy")[self.evaluated[-1]]) if len(self.evaluated) else np.nan

    @property
    def best(self) -> float:
        """The highest accuracy of any round."""
        return float(self.column("accuracy")[self.best_row]) if len(self.evaluated) else np.nan

    @property
    def client_accuracy(self) -> np.ndarray:
        """[N] accuracy of each client's own model in the last evaluated round; [0] where none was."""
        return (
            self.clients["accuracy"][self.evaluated[-1]].astype(float)
            if len(self.evaluated)
            else np.zeros(0)
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings, one for each pair of seeds; ``settings``: of those that differ
    between groups.
    """

    label: str
    settings: dict[str, Any]
    runs: tuple[Logged, ...]

    @property
    def task(self) -> str:
        """What it was run on, as far as that differs between groups: numbers of one task may be
        compared.
        """
        same = {key: value for key, value in self.settings.items() if key.startswith(TASK[:2])}
        return ", ".join(_told(key, value, set(same)) for key, value in same.items())

    def over(self, number) -> Stat:
        """``number(run)`` over the seeds."""
        return Stat.of([number(run) for run in self.runs])

    @cached_property
    def rounds(self) -> np.ndarray:
        """[T] the rounds that all its runs have."""
        return sorted_common([run.rounds["round"] for run in self.runs])

    def curves(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rounds [T], the column [seeds, T]) where every run has a number."""
        rows = [np.isin(run.rounds["round"], self.rounds) for run in self.runs]
        values = np.stack(
            [run.column(name)[at] for run, at in zip(self.runs, rows, strict=True)]
        ).astype(float)
        there = ~np.isnan(values).any(0)
        return self.rounds[there], values[:, there]

    def of_clients(self, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """(rounds [T], for each run the column [T, N] of its clients), of the rounds of
        ``curves('accuracy')``.
        """
        rounds = self.curves("accuracy")[0]
        return rounds, [
            run.clients[name][np.isin(run.rounds["round"], rounds)] for run in self.runs
        ]


class Found(NamedTuple):
    """``groups`` in the order of their first runs; ``keys``: dotted names of the settings that
    differ between them; ``left_out``: runs that are there twice, each with the one that stands for
    it.
    """

    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    left_out: tuple[tuple[Logged, Logged], ...]


def grouped(runs: Sequence[Logged]) -> Found:
    """The runs by their settings. Of two with the same settings and seeds the longer one stays, or
    the first.
    """
    by_setting: dict[str, dict[tuple[int, ...], Logged]] = {}
    left_out = []
    for run in runs:
        seeds = by_setting.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if (other := seeds.get(run.seeds)) is None:
            seeds[run.seeds] = run
            continue
        kept, gone = (other, run) if other.done >= run.done else (run, other)
        seeds[run.seeds] = kept
        left_out.append((gone, kept))
    members = [tuple(seeds.values()) for seeds in by_setting.values()]
    settings = [found[0].settings for found in members]
    keys = differing(settings)
    groups = (
        Group(label, {key: of[key] for key in keys if key in of}, found)
        for label, of, found in zip(labels(settings), settings, members, strict=True)
    )
    return Found(tuple(groups), keys, tuple(left_out))


def differing(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys with several values. A key of a block whose meaning a selector gives
    (``algorithm.lora_epochs``) is compared only where the selector is the same.
    """
    found = []
    for key in _ordered(settings):
        values: dict[str, set[str]] = {}
        for of in settings:
            values.setdefault(_meaning(of, key), set()).add(_text(of.get(key)))
        if any(len(several) > 1 for several in values.values()):
            found.append(key)
    return tuple(found)


def labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each of these from the others, in few settings, in this order: the method, the
    data, the rest.

    A setting that follows from those before it, such as a learning rate of each method's own, is
    left out. One of the experiment (``TASK``) that is needed somewhere is told everywhere.
    """
    same, chosen = [list(range(len(settings)))], {at: [] for at in range(len(settings))}
    for key in dict.fromkeys((_FIRST, *differing(settings))):
        parts = []
        for members in same:
            by_value: dict[str, list[int]] = {}
            for at in members:
                by_value.setdefault(_text(settings[at].get(key)), []).append(at)
            parts += by_value.values()
            for at in members if len(by_value) > 1 or key == _FIRST else ():
                chosen[at].append(key)
        same = parts
    shown = set().union(*chosen.values())
    everywhere = [key for key in _ordered(settings) if key in shown and key.startswith(TASK)]
    for at, keys in chosen.items():
        both = {*keys, *(key for key in everywhere if key in settings[at])}
        chosen[at] = [key for key in _ordered(settings) if key in both]
    return [
        ", ".join(_told(key, settings[at].get(key), shown) for key in chosen[at])
        for at in range(len(settings))
    ]


def short(key: str, among: Sequence[str]) -> str:
    """The last word of a dotted key, or its last two where another of ``among`` ends alike."""
    words = key.split(".")
    alone = sum(other.split(".")[-1] == words[-1] for other in among) < 2 and words[-1] not in (
        "name",
        "kind",
    )
    return words[-1] if alone else ".".join(words[-2:])


def shown(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict) and "name" in value:  # a network of a mix
        return str(value["name"])
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    words = {"null": "none", "true": "yes", "false": "no"}
    return words.get(_text(value), str(value))


def number(value: Any) -> bool:
    """Whether a setting is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key of a config and its value."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def sorted_common(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The values that all arrays have."""
    common = arrays[0]
    for array in arrays[1:]:
        common = np.intersect1d(common, array)
    return common


def _ordered(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys, the method's name first, then the experiment; a selector before the others of its
    block.
    """
    keys = list(dict.fromkeys(key for of in settings for key in of))
    selectors = {f"{block}.{name}" for block, name in SELECTORS.items()}
    return sorted(
        keys,
        key=lambda key: (
            key != _FIRST,
            key != "data.dataset",
            not key.startswith("data."),
            key not in selectors,
        ),
    )


def _meaning(of: Mapping[str, Any], key: str) -> str:
    """The value of the selector over a key; "" where there is none."""
    block = next((block for block in SELECTORS if key.startswith(f"{block}.")), None)
    return (
        ""
        if block is None or key == f"{block}.{SELECTORS[block]}"
        else _text(of.get(f"{block}.{SELECTORS[block]}"))
    )


def _told(key: str, value: Any, shown_keys: set[str]) -> str:
    """A setting in a label."""
    if key == _FIRST:
        return str(value).rpartition(":")[2]
    if key == "model.name" and value is None:
        return "mix"
    return shown(value) if key in _BY_VALUE else f"{short(key, sorted(shown_keys))} {shown(value)}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
