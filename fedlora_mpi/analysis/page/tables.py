"""The tables of a report."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...core.units import duration, size
from ..groups import Found, Group, Stat, shown
from ..parts import LowRank
from ..runs import column
from .clients import Pair, as_good
from .table import Column, Table, percent, plain

_SEEDS = "± is the sample standard deviation over seeds (of run and partition)"


def accuracy(groups: Sequence[Group]) -> Table:
    """A row for each group."""
    columns = [
        Column("run", "method"),
        Column("seeds", "seeds"),
        Column("rounds", "rounds"),
        Column("final", "final / %", percent, best=True),
        Column("best", "best / %", percent, best=True),
        Column("worst", "worst client / %", percent, best=True),
        Column("clients_std", "std over clients / %", percent),
    ]
    rows = [
        {
            "run": group.label,
            "task": group.task,
            "seeds": len(group.runs),
            "rounds": _rounds(group),
            "final": group.over(lambda run: run.final),
            "best": group.over(lambda run: run.best),
            "worst": group.over(
                lambda run: (
                    float(np.nanmin(run.client_accuracy)) if len(run.client_accuracy) else np.nan
                )
            ),
            "clients_std": group.over(_over_clients),
        }
        for group in groups
    ]
    note = (
        "Mean over the clients of the test accuracy of each client's own model. Final, worst client and std over "
        f"clients: in the last evaluated round. Best: of any round, chosen on test data as in the papers. {_SEEDS}; "
        "bold is the highest"
    )
    note += " on the same data." if len({group.task for group in groups}) > 1 else "."
    return Table("accuracy", "Final and best accuracy", note, columns, rows)


def costs(groups: Sequence[Group]) -> Table:
    """What each group has sent, computed and waited for."""

    def total(name):
        return lambda run: float(run.column(name).sum())

    def each(name):
        return lambda run: float(run.column(name).sum() / run.column("clients").sum())

    names = list(
        dict.fromkeys(
            n for g in groups for run in g.runs for n in run.rounds if n.startswith("seconds_")
        )
    )

    def per_round(name):
        return lambda run: float(run.column(name).mean())

    columns = [
        Column("run", "method"),
        Column("bytes_up", "up per client", size),
        Column("bytes_down", "down per client", size),
        Column("tflop", "training / TFLOP", plain),
        *(Column(name, f"{name.removeprefix('seconds_')} / s", plain) for name in names),
        Column("seconds", "in all", duration),
        *(
            [Column("balance", "balance / %", percent)]
            if any(run.load for g in groups for run in g.runs)
            else []
        ),
    ]
    rows = [
        {
            "run": group.label,
            "bytes_up": group.over(each("bytes_up")).mean,
            "bytes_down": group.over(each("bytes_down")).mean,
            "tflop": group.over(total("flops")).mean / 1e12,
            "seconds": sum(group.over(total(name)).mean for name in names),
            **{name: group.over(per_round(name)).mean for name in names},
            "balance": group.over(lambda run: run.load.balance if run.load else np.nan),
        }
        for group in groups
    ]
    note = (
        "Means over seeds. Up and down: bytes of one client in one round, float32. Training: all clients and "
        "rounds. Stages: seconds per round of rank 0, whose waiting for the workers counts as exchange. "
        "Balance: share of their time for which workers are busy if the busiest sets the pace."
    )
    return Table("costs", "Bytes, computation and time", note, columns, rows)


def settings(found: Found) -> Table | None:
    """What sets the groups apart."""
    if not found.keys:
        return None
    names = {key: column(key, found.keys) for key in found.keys}
    columns = [Column("run", "method"), *(Column(name, name) for name in names.values())]

    def tell(group, key):
        return None if key not in group.settings else shown(group.settings[key])

    rows = [
        {"run": group.label} | {name: tell(group, key) for key, name in names.items()}
        for group in found.groups
    ]
    note = "Every setting that is not the same in all runs, but for seeds, folders and how it was computed; - where a "
    note += "method has none."
    return Table("settings", "What differs", note, columns, rows)


def runs(groups: Sequence[Group]) -> Table:
    """A row for each run."""
    columns = [
        Column("run", "method"),
        Column("seed", "seed"),
        Column("partition_seed", "seed of the split"),
        Column("rounds", "rounds"),
        Column("final", "final / %", percent),
        Column("best", "best / %", percent),
        Column("best_round", "best round"),
        Column("path", "folder"),
    ]
    rows = [
        {
            "run": group.label,
            "seed": run.seeds[0],
            "partition_seed": run.seeds[1],
            "rounds": str(run.done)
            if run.done >= run.config["rounds"]
            else f"{run.done} of {run.config['rounds']}",
            "final": run.final,
            "best": run.best,
            "best_round": int(run.rounds["round"][run.best_row]) if len(run.evaluated) else None,
            "path": str(run.path),
        }
        for group in groups
        for run in group.runs
    ]
    return Table("runs", "The runs", "Mean accuracy over clients, as above.", columns, rows)


def against(pairs: Sequence[Pair]) -> Table | None:
    """How many clients a method serves at least as well as FedAvg and Local."""
    if not pairs:
        return None
    columns = [
        Column("run", "method"),
        Column("rival", "against"),
        Column("seeds", "seeds"),
        Column("clients", "clients"),
        Column("as_good", "as good or better"),
        Column("gain", "mean gain / points", _signed),
        Column("worst", "worst client's gain / points", _signed),
    ]
    rows = [
        {
            "run": pair.group.label,
            "rival": pair.rival.label,
            "seeds": pair.seeds,
            "clients": len(pair.mine),
            "as_good": as_good(pair),
            "gain": float((pair.mine - pair.theirs).mean()),
            "worst": float((pair.mine - pair.theirs).min()),
        }
        for pair in pairs
    ]
    note = "Accuracy of each client in the last evaluated rounds, percentage points; clients of all seeds that both "
    note += "have, together."
    return Table("against", "Each client against FedAvg and Local", note, columns, rows)


def low_rank(found: Mapping[str, LowRank]) -> Table | None:
    """A row for each group and layer."""
    if not found:
        return None
    columns = [
        Column("run", "method"),
        Column("layer", "layer"),
        Column("r", "r", _given),
        Column("effective_rank", "effective rank", plain),
        Column("norm", "norm", plain),
    ]
    rows = [
        {
            "run": label,
            "layer": layer,
            "r": Stat.of(part.given_rank[at]).mean,
            "effective_rank": Stat.of(part.effective_rank[at]),
            "norm": Stat.of(part.norm[at]),
        }
        for label, part in found.items()
        for at, layer in enumerate(part.layers)
    ]
    note = "Of s B A in the newest checkpoint of the first seed: mean ± sample standard deviation over clients."
    return Table("lowrank", "Low-rank parts by layer", note, columns, rows)


def _rounds(group: Group) -> str:
    """20, or 12 to 20 where runs are not done."""
    return " to ".join(
        str(n)
        for n in sorted({min(run.done for run in group.runs), max(run.done for run in group.runs)})
    )


def _over_clients(run) -> float:
    """The sample standard deviation over the clients."""
    there = run.client_accuracy[~np.isnan(run.client_accuracy)]
    return float(there.std(ddof=1)) if len(there) > 1 else np.nan


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _given(rank: float) -> str:
    return f"{rank:g}"
