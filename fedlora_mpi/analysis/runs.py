"""Several run folders for analysis: each run, and tidy tables over all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.paths import expanded
from .groups import SEEDS, Found, Logged, grouped, short
from .run_view import RunView, imported_pandas, of_clients

if TYPE_CHECKING:
    from pandas import DataFrame


def open_runs(pattern: str | Path | Sequence[str | Path]) -> "Runs":
    """The runs whose folders a pattern matches (``runs/*``, ``runs/**``), or those of a list of
    folders.

    What a pattern matches beside run folders is passed over. Raises ValueError when no run is left.

    >>> import fedlora_mpi
    >>> runs = fedlora_mpi.open_runs("runs/*")
    >>> list(runs)
    ['runs/a-1', 'runs/a-2', 'runs/b-1']
    >>> list(runs.rounds.columns[:6])
    ['path', 'run', 'seed', 'partition_seed', 'algorithm', 'round']
    >>> runs.rounds.groupby(["run", "round"])["accuracy"].agg(["mean", "std"]).shape  # over seeds
    (4, 2)
    >>> runs.clients.query("round == 2").groupby("run")["accuracy"].count().to_dict()
    {'fedavg': 14, 'local': 7}
    >>> len(runs["runs/a-2"].client(3).counts)  # classes; one of the runs, as open_run gives it
    4
    """
    if isinstance(pattern, str | Path):
        found = sorted(glob(str(expanded(pattern)), recursive=True))
        paths = [Path(path) for path in found if (Path(path) / "log.h5").is_file()]
        paths = [path for path in paths if path.parent.name != "checkpoints"]
        if not paths:
            raise ValueError(
                f"{pattern}: matches no run folder, one with a log.h5; give the `output` of runs"
            )
    else:
        paths = [expanded(path) for path in pattern]
    return Runs(paths)


class Runs(Mapping[str, RunView]):
    """{path as text: run}. Tables are read anew on every access, also while runs are still going.

    The settings that differ between the runs are columns, under the last word of their dotted
    names; ``run`` is a label made of them, equal for runs that differ in their seeds only.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises StoreError (a ValueError) when one is no run folder."""
        self._views = {str(path): RunView(path) for path in paths}

    def __getitem__(self, path: str | Path) -> RunView:
        return self._views[str(path)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def settings(self) -> "DataFrame":
        """One row a run: path, run (its label), seed, partition_seed, and each setting that
        differs.
        """
        return imported_pandas().DataFrame(_described(self._logs()))

    @property
    def rounds(self) -> "DataFrame":
        """One row for each run and round: the columns of ``settings``, round, and those of the log.

        Columns are those of any run; NaN where a run has none, and in rounds that were not
        evaluated.
        """
        return of_rounds(self._logs())

    @property
    def clients(self) -> "DataFrame":
        """One row for each run, evaluated round and client: the columns of ``settings``, round,
        client, accuracy ...
        """
        return of_all_clients(self._logs())

    def _logs(self) -> list[Logged]:
        """In the order of the paths."""
        return [Logged.read(view.path) for view in self._views.values()]


def of_rounds(logs: Sequence[Logged]) -> "DataFrame":
    """``Runs.rounds`` of logs that have been read."""
    return _table(logs, lambda run: imported_pandas().DataFrame(run.rounds))


def of_all_clients(logs: Sequence[Logged]) -> "DataFrame":
    """``Runs.clients`` of logs that have been read."""
    return _table(logs, lambda run: of_clients(run.rounds, run.clients))


def _table(logs: Sequence[Logged], columns_of: Callable[[Logged], "DataFrame"]) -> "DataFrame":
    pandas, parts = imported_pandas(), []
    for about, run in zip(_described(logs), logs, strict=True):
        table = columns_of(run)
        repeated = {name: [value] * len(table) for name, value in about.items()}
        parts.append(pandas.concat([pandas.DataFrame(repeated, index=table.index), table], axis=1))
    return pandas.concat(parts, ignore_index=True)


def _described(logs: Sequence[Logged]) -> list[dict]:
    """The columns of ``Runs.settings`` of each; a run that is there twice is there twice."""
    found = grouped(logs)
    return [_about(run, found) for run in logs]


def _about(run: Logged, found: Found) -> dict:
    stands = dict(found.left_out).get(run, run)
    group = next(group for group in found.groups if stands in group.runs)
    seeds = dict(zip(("seed", "partition_seed"), run.seeds, strict=True))
    settings = {column(key, found.keys): group.settings.get(key) for key in found.keys}
    return {"path": str(run.path), "run": group.label} | seeds | settings


def column(key: str, keys: Sequence[str]) -> str:
    """The name of a setting as a column: ``algorithm`` for algorithm.name, else its last words."""
    block, _, name = key.rpartition(".")
    taken = ("path", "run", "round", "client", "clients", "loss", "rounds", *SEEDS)
    if name == "name":
        return block
    return short(key, (*keys, *(f".{word}" for word in taken)))
