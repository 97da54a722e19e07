"""Read several run folders for analysis: each run, and tidy tables of all runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.paths import expand_home
from ..store.sweep_folder import expand_sweeps, is_sweep
from .groups import SEED_KEYS, RunGroups, RunLog, group_runs, short_key
from .run_view import RunView, client_table, import_pandas

if TYPE_CHECKING:
    from pandas import DataFrame


def open_runs(pattern: str | Path | Sequence[str | Path]) -> "Runs":
    """Return the runs in the folders that match a pattern (``runs/*``, ``runs/**``) or in a list.

    The folder of a sweep stands for its runs. Matches that are no run folders are skipped. Raises
    ValueError if a pattern matches no run folder.

    >>> import fedlora_mpi
    >>> runs = fedlora_mpi.open_runs("runs/*")
    >>> list(runs)
    ['runs/a-1', 'runs/a-2', 'runs/b-1']
    >>> list(runs.rounds.columns[:6])
    ['path', 'run', 'seed', 'partition_seed', 'algorithm', 'round']
    >>> runs.rounds.groupby(["run", "round"])["accuracy"].agg(["mean", "std"]).shape  # over seeds
    (4, 2)
    >>> runs.clients.query("round == 2").groupby("run")["accuracy"].count().to_dict()
    {'FedAvg': 14, 'Local': 7}
    >>> len(runs["runs/a-2"].client(3).counts)  # classes; runs[path] is a run as from open_run
    4
    """
    if isinstance(pattern, str | Path):
        matches = sorted(glob(str(expand_home(pattern)), recursive=True))
        folders = [Path(path) for path in matches]
        folders = [path for path in folders if is_sweep(path) or (path / "log.h5").is_file()]
        paths = list(dict.fromkeys(expand_sweeps(folders)))  # ** also matches the runs of a sweep
        paths = [path for path in paths if path.parent.name != "checkpoints"]
        if not paths:
            raise ValueError(
                f"{pattern}: matches no run folder, one with a log.h5; give the `output` of runs"
            )
    else:
        paths = expand_sweeps([expand_home(path) for path in pattern])
    return Runs(paths)


class Runs(Mapping[str, RunView]):
    """{path as text: run}.

    Each access reads the tables anew, also while runs are still going. Each setting that differs
    between the runs is a column; its name is the last word of the setting's dotted name. ``run`` is
    a label made of these settings; runs that differ only in their seeds have the same label.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the runs. Raises StoreError (a ValueError) if a path is no run folder."""
        self._views = {str(path): RunView(path) for path in paths}

    def __getitem__(self, path: str | Path) -> RunView:
        return self._views[str(path)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def settings(self) -> "DataFrame":
        """One row per run: path, run (its label), seed, partition_seed, and each setting that
        differs.
        """
        return import_pandas().DataFrame(_describe_runs(self._logs()))

    @property
    def rounds(self) -> "DataFrame":
        """One row for each run and round: the columns of ``settings``, round, and those of the log.

        There is a column for every column of any run. It is NaN for a run that does not have it;
        evaluation columns are NaN in rounds without evaluation.
        """
        return rounds_table(self._logs())

    @property
    def clients(self) -> "DataFrame":
        """One row for each run, evaluated round and client: the columns of ``settings``, round,
        client, accuracy ...
        """
        return clients_table(self._logs())

    def _logs(self) -> list[RunLog]:
        """Read the logs, in the order of the paths."""
        return [RunLog.read(view.path) for view in self._views.values()]


def rounds_table(logs: Sequence[RunLog]) -> "DataFrame":
    """Return the table ``Runs.rounds`` from logs that have been read."""
    return _concat_tables(logs, lambda run: import_pandas().DataFrame(run.rounds))


def clients_table(logs: Sequence[RunLog]) -> "DataFrame":
    """Return the table ``Runs.clients`` from logs that have been read."""
    return _concat_tables(logs, lambda run: client_table(run.rounds, run.clients))


def _concat_tables(
    logs: Sequence[RunLog], columns_of: Callable[[RunLog], "DataFrame"]
) -> "DataFrame":
    pandas, tables = import_pandas(), []
    for description, run in zip(_describe_runs(logs), logs, strict=True):
        table = columns_of(run)
        repeated = {name: [value] * len(table) for name, value in description.items()}
        tables.append(pandas.concat([pandas.DataFrame(repeated, index=table.index), table], axis=1))
    return pandas.concat(tables, ignore_index=True)


def _describe_runs(logs: Sequence[RunLog]) -> list[dict]:
    """Return a row of ``Runs.settings`` for each log; a log that is given twice has two rows."""
    run_groups = group_runs(logs)
    return [_describe_run(run, run_groups) for run in logs]


def _describe_run(run: RunLog, run_groups: RunGroups) -> dict:
    representative = dict(run_groups.left_out).get(run, run)
    group = next(group for group in run_groups.groups if representative in group.runs)
    seeds = dict(zip(("seed", "partition_seed"), run.seeds, strict=True))
    settings = {
        column_name(key, run_groups.keys): group.settings.get(key) for key in run_groups.keys
    }
    return {"path": str(run.path), "run": group.label} | seeds | settings


def column_name(key: str, keys: Sequence[str]) -> str:
    """Return the column name of a setting.

    It is the block for a key that ends in ``name`` (``algorithm`` for algorithm.name), else the
    last word of the key, or its last two words if the last one is ambiguous.
    """
    block, _, name = key.rpartition(".")
    reserved = ("path", "run", "round", "client", "clients", "loss", "rounds", *SEED_KEYS)
    if name == "name":
        return block
    return short_key(key, (*keys, *(f".{word}" for word in reserved)))
