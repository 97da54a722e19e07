"""Which runs a table of a paper needs, and the config of each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..config import Config, from_dict
from .paper import V

SCALES = ("small", "full")


class Scale(NamedTuple):
    """How much of a paper's experiment is run."""

    clients: int
    train: int  # samples per client; 0: as many as the split gives
    test: int
    batch_size: int
    epochs: int
    rounds: int

    def cut(self, full: "Scale", whose: str = "paper") -> str:
        """What differs from full scale, which is ``whose``, for the header of a table; "" where
        nothing does.
        """
        pairs = zip(self._fields, self, full, strict=True)
        changes = [
            f"{name} {ours} ({whose} {theirs or 'all'})"
            for name, ours, theirs in pairs
            if ours != theirs
        ]
        return ", ".join(changes)


@dataclass(frozen=True)
class Case(ABC):
    """What a table is made for: a data set, and what else its paper varies from table to table."""

    data: str
    whose: ClassVar[str] = "paper"  # where the sizes of full scale are from

    @property
    @abstractmethod
    def name(self) -> str:
        """For file names, from the data set on."""

    @property
    @abstractmethod
    def said(self) -> str:
        """For people."""

    @abstractmethod
    def at(self, scale: str) -> Scale:
        """The size at one of ``SCALES``."""

    @property
    def less(self) -> str:
        """What its data lack of the paper's; "" where nothing."""
        return ""

    @property
    def source(self) -> Mapping[str, Any]:
        """``data`` without data set, root and partition."""
        return {}

    @property
    @abstractmethod
    def split(self) -> Mapping[str, Any]:
        """``data.partition`` without sizes and seed."""

    @property
    @abstractmethod
    def model(self) -> Mapping[str, Any]:
        """The config's block."""

    @property
    @abstractmethod
    def optimizer(self) -> Mapping[str, float]:
        """``train`` without epochs and batch size."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table: a method with its settings. ``key`` names its runs."""

    key: str
    label: str  # as the paper writes it
    algorithm: Mapping[str, Any]  # the config's block
    published: V | None = None
    participation: float = 1.0


class Job(NamedTuple):
    """One run: ``config.output`` is its folder."""

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

    def beside(self, suffix: str) -> Path:
        """The file next to the run folder, for instance its config (.yaml)."""
        return self.folder.with_name(self.folder.name + suffix)


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper. ``entries(case, scale)``: its cells in the paper's order."""

    title: str
    entries: Callable[[Any, Scale], Iterator[Entry]]
    rule: str  # what the paper leaves open and how it is decided here
    open_to_all: bool = False  # whether --methods may add algorithms that the paper has not
    papers: str = "the paper's, over 3 seeds, does not say which"  # what is known of its ±


def job(
    entry: Entry, case: Case, seed: int, *, scale: Scale, rounds: int, root: str, folder: Path
) -> Job:
    """A run and its config. ``folder``: of the table. Raises ConfigError (a ValueError)."""
    name = f"{case.name}/{entry.key}-seed{seed}"
    sizes = {"clients": scale.clients, "train": scale.train, "test": scale.test}
    mapping = {
        "seed": seed,
        "rounds": rounds,
        "participation": entry.participation,
        "output": str(folder / name),
        "data": {
            "dataset": case.data,
            "root": root,
            **case.source,
            "partition": {**case.split, "seed": seed, **sizes},
        },
        "model": dict(case.model),
        "algorithm": dict(entry.algorithm),
        "train": {"epochs": scale.epochs, "batch_size": scale.batch_size, **case.optimizer},
        "checkpoint": {"every": 10, "keep": 1},  # a grid of runs fills a disk
    }
    return Job(entry, case, seed, from_dict(mapping, f"{name}.yaml"))
