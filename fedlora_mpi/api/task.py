"""What ``run`` and ``resume`` train, as values, and how they train it: here or on several ranks."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from .. import config as configs
from ..config import Config
from ..core.paths import expand_home
from ..experiment import loop
from ..experiment.output import config_to_resume
from ..experiment.stopping import lost_rounds_of
from ..mpi import local_ranks
from ..mpi.comm import Comm, Solo
from ..mpi.ending import collectively


class Task(Protocol):
    """A training that the command line or Python asks for."""

    def read(self) -> Config:
        """Return its config. Raises ValueError."""

    def train(self, comm: Comm) -> int:
        """Train on the ranks of ``comm`` and return the exit code. Raises CollectiveExit."""

    def arguments(self, ranks: int) -> AbstractContextManager[list[str]]:
        """Inside, the command line that does the same on ``ranks`` ranks, without the program."""


@dataclass(frozen=True)
class NewRun:
    """A run from a config.

    config: a YAML file, the name of a config of the package, or the keys; overrides: ``key=value``
    texts; resume: go on if the run folder is there; overwrite: replace it if it is there; quiet: no
    line for each round.
    """

    config: str | Mapping[str, Any]
    overrides: Sequence[str] = ()
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def read(self) -> Config:
        """Return the config. Raises ValueError."""
        return configs.read(self.config, self.overrides)

    def train(self, comm: Comm) -> int:
        """Train on the ranks of ``comm`` and return the exit code. Raises CollectiveExit."""
        config, comm = loop.receive_config(comm, self.read)
        source = configs.source_of(self.config)
        if self.resume:
            return loop.start_or_resume(config, source, comm, self.quiet)
        return loop.start(config, source, comm, self.overwrite, self.quiet)

    @contextmanager
    def arguments(self, ranks: int) -> Iterator[list[str]]:
        """Inside, the command line that does the same on ``ranks`` ranks, without the program."""
        names = ("resume", "overwrite", "quiet")
        flags = [f"--{name}" for name in names if getattr(self, name)]
        with _as_file(self.config) as file:
            yield ["run", *flags, "--ranks", str(ranks), "--", file, *self.overrides]


@dataclass(frozen=True)
class ResumedRun:
    """A run folder that goes on. overrides, quiet: as in ``NewRun``."""

    folder: Path
    overrides: Sequence[str] = ()
    quiet: bool = False

    def read(self) -> Config:
        """Return the config. Raises ValueError."""
        return config_to_resume(self.folder, self.overrides)

    def train(self, comm: Comm) -> int:
        """Train on the ranks of ``comm`` and return the exit code. Raises CollectiveExit."""
        return loop.resume(self.folder, self.overrides, comm, self.quiet)

    @contextmanager
    def arguments(self, ranks: int) -> Iterator[list[str]]:
        """Inside, the command line that does the same on ``ranks`` ranks, without the program."""
        flags = ["--quiet"] if self.quiet else []
        yield ["resume", *flags, "--ranks", str(ranks), "--", str(self.folder), *self.overrides]


def check_ranks(ranks: int | None, comm: Comm) -> None:
    """Raise Refusal on all ranks if ``--ranks`` is not the number that was launched."""
    if ranks is not None:
        collectively(comm, lambda: local_ranks.check_ranks(ranks, comm.size))


def train_on_ranks(task: Task, ranks: int, write: Callable[[str], Any] | None = None) -> int:
    """Train on so many ranks of this machine and return the exit code; one rank is this process.

    write: gets what the ranks print, line by line; None: they print it themselves. A mistake is
    told before any rank starts. Raises Refusal, also if there is no launcher.
    """

    def check_and_read() -> Config:
        local_ranks.check_ranks(ranks, None)
        return task.read()

    config = collectively(Solo(), check_and_read)
    if ranks == 1:
        return task.train(Solo())
    with task.arguments(ranks) as arguments:
        code = collectively(
            Solo(),
            lambda: local_ranks.run_ranks(ranks, arguments, config.faults.tolerate, write),
        )
    line = lost_rounds_of(expand_home(config.output), config.rounds)
    if code == local_ranks.INTERRUPTED_EXIT and line:
        print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _as_file(config: str | Mapping[str, Any]) -> Iterator[str]:
    """Inside, the name of a file with the keys of ``config``, if it is no file."""
    if not isinstance(config, Mapping):
        yield config
        return
    with TemporaryDirectory(prefix="fedlora-mpi-") as folder:
        file = Path(folder) / f"{configs.source_of(config)}.yaml"
        file.write_text(configs.tree_yaml(config), encoding="utf-8")
        yield str(file)
