"""The runs that a table of a paper needs, and the config of each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from ..config import Config, from_dict
from .paper import Accuracy

SCALES = ("small", "medium", "full")  # "medium" is table1's alone


class Scale(NamedTuple):
    """The sizes of an experiment: the paper's, or smaller ones."""

    clients: int
    train: int  # samples per client; 0: as many as the split gives
    test: int
    batch_size: int
    epochs: int
    rounds: int

    def describe_cut(self, full: "Scale", full_scale_source: str = "paper") -> str:
        """The sizes that differ from full scale, for the header of a table; "" if none does.

        ``full_scale_source`` says where the full-scale sizes come from.
        """
        pairs = zip(self._fields, self, full, strict=True)
        changes = [
            f"{name} {size} ({full_scale_source} {full_size or 'all'})"
            for name, size, full_size in pairs
            if size != full_size
        ]
        return ", ".join(changes)


class Score(NamedTuple):
    """What a table judges its methods by."""

    column: str  # of the log
    label: str
    factor: float = 1.0  # of the numbers in the log
    higher_is_better: bool = True


ACCURACY = Score("accuracy", "accuracy in %", factor=100.0)
PERPLEXITY = Score("perplexity", "perplexity", higher_is_better=False)


@dataclass(frozen=True)
class Case(ABC):
    """The setting for which a table is made: a data set, and whatever else its paper varies from
    table to table.
    """

    data: str
    full_scale_source: ClassVar[str] = "paper"  # where the full-scale sizes come from

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the case in file names; it starts with the data set."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The description of the case in titles."""

    @abstractmethod
    def scale_sizes(self, scale: str) -> Scale:
        """The sizes at one of ``SCALES``."""

    @property
    def paper_sizes(self) -> Scale:
        """The sizes with which the sizes of a scale are compared."""
        return self.scale_sizes("full")

    @property
    def data_difference(self) -> str:
        """How its data differ from the paper's; "" if they do not."""
        return ""

    @property
    def dataset(self) -> str:
        """The config key ``data.dataset``."""
        return self.data

    @property
    def source(self) -> Mapping[str, Any]:
        """The config block ``data`` without data set, root and partition."""
        return {}

    @property
    @abstractmethod
    def split(self) -> Mapping[str, Any]:
        """The config block ``data.partition`` without sizes and seed."""

    @property
    @abstractmethod
    def model(self) -> Mapping[str, Any]:
        """The config block ``model``."""

    @property
    @abstractmethod
    def optimizer(self) -> Mapping[str, float]:
        """The config block ``train`` without epochs and batch size."""

    @property
    def metrics(self) -> Sequence[str]:
        """The config key ``evaluate.metrics``."""
        return ()

    def prepare(  # noqa: B027  (most cases need no file)
        self, root: str, download: bool, report: Callable[[str], None]
    ) -> None:
        """Make the files that its runs read and that do not exist yet.

        root, download: as in the config block ``data``. ``report`` takes a line of progress.
        """


@dataclass(frozen=True)
class Entry:
    """One cell of a table: a method with its settings. ``key`` names its runs."""

    key: str
    label: str  # as the paper writes it
    algorithm: Mapping[str, Any]  # the config block
    published: Accuracy | None = None
    participation: float = 1.0
    lr: float | None = None  # None: that of the case
    non_finite: Literal["stop", "skip"] = "stop"  # the config key ``faults.non_finite``
    topology: str | None = None  # the config key ``topology``


class Job(NamedTuple):
    """One run. ``config.output`` is its folder."""

    entry: Entry
    case: Case
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def name(self) -> str:
        """``<case>/<key>-seed<seed>``, as in the file names."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def sibling_path(self, suffix: str) -> Path:
        """The file next to the run folder with this suffix, for instance its config (.yaml)."""
        return self.folder.with_name(self.folder.name + suffix)


class Tuning(NamedTuple):
    """How a table chooses the learning rate of each method: of ``rates`` the best with ``seed``, by
    the ``score`` of the last rounds. No run of the table has this seed.
    """

    rates: tuple[float, ...]
    seed: int
    score: Score = ACCURACY


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper. ``entries(case, scale)`` yields its cells in paper order."""

    title: str
    entries: Callable[[Any, Scale], Iterator[Entry]]
    open_choices: str  # what the paper leaves open, and our choice
    allows_other_methods: bool = False  # whether --methods may add algorithms not in the paper
    # what is known of the paper's ±
    std_note: str = "the paper's, over 3 seeds, does not say which"
    tuning: Tuning | None = None  # None: the cases say the learning rate


def make_job(
    entry: Entry, case: Case, seed: int, *, scale: Scale, rounds: int, root: str, folder: Path
) -> Job:
    """A run and its config. ``folder`` is that of the table. Raises ConfigError (a ValueError) if a
    setting is wrong.
    """
    name = f"{case.name}/{entry.key}-seed{seed}"
    sizes = {"clients": scale.clients, "train": scale.train, "test": scale.test}
    mapping = {
        "seed": seed,
        "rounds": rounds,
        "participation": entry.participation,
        "output": str(folder / name),
        "data": {
            "dataset": case.dataset,
            "root": root,
            **case.source,
            "partition": {**case.split, "seed": seed, **sizes},
        },
        "model": dict(case.model),
        "algorithm": dict(entry.algorithm),
        "train": {
            "epochs": scale.epochs,
            "batch_size": scale.batch_size,
            **case.optimizer,
            **({} if entry.lr is None else {"lr": entry.lr}),
        },
        "topology": entry.topology,
        "faults": {"non_finite": entry.non_finite},
        "evaluate": {"metrics": list(case.metrics)},
        "checkpoint": {"every": 10, "keep": 1},  # few, since a grid of runs fills a disk
    }
    return Job(entry, case, seed, from_dict(mapping, f"{name}.yaml"))
