"""Build the tables of a report."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...core.units import format_bytes, format_seconds, unit_prefix
from ..groups import Group, RunGroups, Stat, count_clients, format_setting
from ..paired import Comparison
from ..parts import LowRank
from ..runs import column_name
from ..scores import describe_directions
from .clients import RivalPair, num_as_good
from .table import Column, Table, format_number, format_percent

_MAX_SETTING_COLUMNS = 7  # so many settings are the columns of a table; more are its rows
_SEED_NOTE = "± is the sample standard deviation over seeds (of run and partition)"


def accuracy_table(groups: Sequence[Group]) -> Table:
    """Return the final and best accuracy and further scores, with a row for each group."""
    runs = [run for group in groups for run in group.runs]
    scores = list(dict.fromkeys(name for run in runs for name in run.scores))
    has_accuracy = not scores or any(len(run.evaluated_rows) for run in runs)
    accuracy_columns = [
        Column("final", "final / %", format_percent, marks_best=True),
        Column("best", "best / %", format_percent, marks_best=True),
        Column("worst", "worst client / %", format_percent, marks_best=True),
        Column("clients_std", "std over clients / %", format_percent),
    ]
    columns = [
        Column("run", "method"),
        Column("seeds", "seeds"),
        Column("rounds", "rounds"),
        *(accuracy_columns if has_accuracy else []),
        *(Column(name, name, format_number) for name in scores),
    ]
    rows = [
        {
            "run": group.label,
            "task": group.task,
            "seeds": len(group.runs),
            "rounds": _format_rounds(group),
            "final": group.seed_stat(lambda run: run.final),
            "best": group.seed_stat(lambda run: run.best),
            "worst": group.seed_stat(
                lambda run: (
                    float(np.nanmin(run.client_accuracy)) if len(run.client_accuracy) else np.nan
                )
            ),
            "clients_std": group.seed_stat(_client_std),
            **{
                name: group.seed_stat(lambda run, name=name: run.scores.get(name, np.nan))
                for name in scores
            },
        }
        for group in groups
    ]
    score_note = f"In the last evaluated round: {describe_directions(scores)}."
    if not has_accuracy:
        note = f"Mean over {count_clients(groups)}. {score_note} {_SEED_NOTE}."
        return Table("accuracy", "Final scores", note, columns, rows)
    note = (
        f"Mean over {count_clients(groups)} of the test accuracy of each client's own model. "
        "Final, worst client and std over clients: in the last evaluated round. Best: of any "
        f"round, chosen on test data as in the papers. {_SEED_NOTE}; bold is the highest"
    )
    note += " on the same data." if len({group.task for group in groups}) > 1 else "."
    note += f" {score_note}" if scores else ""
    return Table("accuracy", "Final and best accuracy", note, columns, rows)


def cost_table(groups: Sequence[Group]) -> Table:
    """Return the bytes and the FLOPs of each group."""

    def per_client_round(name):
        return lambda run: float(run.column(name).sum() / run.column("clients").sum())

    columns = [
        Column("run", "method"),
        Column("bytes_up", "up per client and round", format_bytes),
        Column("bytes_down", "down per client and round", format_bytes),
        Column("bytes", "up and down in all", format_bytes),
        Column("tflop", "training in all", _format_tflop),
    ]
    rows = [
        {
            "run": group.label,
            "bytes_up": group.seed_stat(per_client_round("bytes_up")).mean,
            "bytes_down": group.seed_stat(per_client_round("bytes_down")).mean,
            "bytes": group.seed_stat(
                lambda run: float((run.column("bytes_up") + run.column("bytes_down")).sum())
            ).mean,
            "tflop": group.seed_stat(lambda run: float(run.column("flops").sum())).mean / 1e12,
        }
        for group in groups
    ]
    note = (
        "Means over seeds. Bytes: what a real federation would send as float32. In all: all "
        "clients and rounds."
    )
    return Table("costs", "Bytes and computation", note, columns, rows)


def time_table(groups: Sequence[Group]) -> Table:
    """Return the seconds of each group; of several workers those of the median and the slowest."""
    seconds = [group.worker_seconds() for group in groups]
    stages = list(dict.fromkeys(stage for of_group in seconds for stage in of_group.median))
    has_several = any(of_group.workers > 1 for of_group in seconds)
    columns = [
        Column("run", "method"),
        *([Column("of", "of")] if has_several else []),
        *(Column(f"seconds_{stage}", f"{stage} / s", _format_stage) for stage in stages),
        *([Column("balance", "balance / %", format_percent)] if has_several else []),
        Column("seconds", "all rounds", format_seconds),
    ]
    rows = []
    for group, (workers, median, slowest) in zip(groups, seconds, strict=True):
        total = group.seed_stat(lambda run: run.total_seconds).mean
        balance = group.seed_stat(lambda run: run.rank_load.balance if run.rank_load else np.nan)
        described = [(f"median of {workers} workers", median), ("slowest worker", slowest)]
        for of, of_worker in described if workers > 1 else [("one process", median)]:
            row = {f"seconds_{stage}": value for stage, value in of_worker.items()}
            rows.append(
                {"run": group.label, "of": of, "seconds": total, "balance": balance.mean, **row}
            )
    note = (
        "Means over seeds and rounds, of the ranks that train clients. The median and the slowest "
        "worker: by the time for training and evaluation. Waiting: for other ranks. Balance: the "
        "share of their time for which workers are busy if the slowest sets the pace."
    )
    return Table("seconds", "Seconds of a round", note, columns, rows)


def settings_table(run_groups: RunGroups) -> Table | None:
    """Return the settings that differ between the groups, but for the method; None without any."""
    keys = [key for key in run_groups.keys if key != "algorithm.name"]
    if not keys:
        return None
    names = {key: column_name(key, run_groups.keys) for key in keys}
    cells = {
        group.label: {
            names[key]: format_setting(group.settings[key]) for key in keys if key in group.settings
        }
        for group in run_groups.groups
    }
    note = (
        "Every setting that is not the same in all runs, but for seeds, folders and how it was "
        "computed; - where a method has none."
    )
    if len(keys) <= max(_MAX_SETTING_COLUMNS, len(cells)):
        columns = [Column("run", "method"), *(Column(name, name) for name in names.values())]
        rows = [{"run": label, **of_group} for label, of_group in cells.items()]
    else:  # as columns they would not fit the page
        columns = [Column("setting", "setting"), *(Column(label, label) for label in cells)]
        rows = [
            {"setting": name} | {label: of.get(name, "-") for label, of in cells.items()}
            for name in names.values()
        ]
    return Table("settings", "What differs", note, columns, rows)


def run_table(groups: Sequence[Group]) -> Table:
    """Return a row for each run."""
    columns = [
        Column("run", "method"),
        Column("seed", "seed"),
        Column("partition_seed", "seed of the split"),
        Column("rounds", "rounds"),
        Column("final", "final / %", format_percent),
        Column("best", "best / %", format_percent),
        Column("best_round", "best round"),
        Column("path", "folder"),
    ]
    rows = [
        {
            "run": group.label,
            "seed": run.seeds[0],
            "partition_seed": run.seeds[1],
            "rounds": str(run.rounds_done)
            if run.rounds_done >= run.config["rounds"]
            else f"{run.rounds_done} of {run.config['rounds']}",
            "final": run.final,
            "best": run.best,
            "best_round": int(run.rounds["round"][run.best_row])
            if len(run.evaluated_rows)
            else None,
            "path": str(run.path),
        }
        for group in groups
        for run in group.runs
    ]
    return Table("runs", "The runs", "Mean accuracy over clients, as above.", columns, rows)


def rival_table(pairs: Sequence[RivalPair]) -> Table | None:
    """Compare each client's accuracy with FedAvg and Local; None without a pair of methods."""
    if not pairs:
        return None
    columns = [
        Column("run", "method"),
        Column("rival", "against"),
        Column("seeds", "seeds"),
        Column("clients", "clients"),
        Column("as_good", "as good or better"),
        Column("gain", "mean gain / points", _format_gain),
        Column("worst", "worst client's gain / points", _format_gain),
    ]
    rows = [
        {
            "run": pair.group.label,
            "rival": pair.rival.label,
            "seeds": pair.seeds,
            "clients": len(pair.group_accuracy),
            "as_good": num_as_good(pair),
            "gain": float((pair.group_accuracy - pair.rival_accuracy).mean()),
            "worst": float((pair.group_accuracy - pair.rival_accuracy).min()),
        }
        for pair in pairs
    ]
    note = (
        "Accuracy of each client in the last evaluated rounds, percentage points; clients of all "
        "seeds that both "
    )
    note += "have, together."
    return Table("against", "Each client against FedAvg and Local", note, columns, rows)


def comparison_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Compare the best setting of each task with every other one; None if there is none."""
    if not comparisons:
        return None
    columns = [
        Column("run", "method"),
        Column("rival", "against"),
        Column("difference", "difference / points", _format_gain),
        Column("low", "interval from / points", _format_gain),
        Column("high", "to / points", _format_gain),
        Column("p", "Wilcoxon p", format_number),
        Column("seeds", "seeds"),
        Column("clients", "clients"),
    ]
    rows = [
        {
            "run": comparison.leader.label,
            "rival": comparison.rival.label,
            "difference": comparison.difference,
            "low": comparison.interval[0],
            "high": comparison.interval[1],
            "p": comparison.p,
            "seeds": comparison.seeds,
            "clients": comparison.clients,
        }
        for comparison in comparisons
    ]
    note = (
        "Final accuracy on the same seeds, splits and clients. Interval: 95 % bootstrap over seeds "
        "and clients; with one seed it says nothing about other seeds. p: Wilcoxon signed-rank "
        "test over clients, of their means over seeds if all seeds have one split. Neither is "
        "corrected for the number of rows."
    )
    return Table("paired", "The best setting against the others", note, columns, rows)


def low_rank_table(factors_of: Mapping[str, LowRank]) -> Table | None:
    """Return rank and norm of the low-rank parts by group and layer; None if there are none."""
    if not factors_of:
        return None
    columns = [
        Column("run", "method"),
        Column("layer", "layer"),
        Column("r", "r", _format_rank),
        Column("effective_rank", "effective rank", _format_effective_rank),
        Column("norm", "norm", format_number),
    ]
    rows = [
        {
            "run": label,
            "layer": layer,
            "r": Stat.from_values(factors.num_components[index]).mean,
            "effective_rank": Stat.from_values(factors.effective_rank[index]),
            "norm": Stat.from_values(factors.norm[index]),
        }
        for label, factors in factors_of.items()
        for index, layer in enumerate(factors.layers)
    ]
    note = (
        "Of s B A in the newest checkpoint of the first seed: mean ± sample standard deviation "
        "over clients."
    )
    return Table("lowrank", "Low-rank parts by layer", note, columns, rows)


def _format_rounds(group: Group) -> str:
    """Return the group's rounds, such as "20", or "12 to 20" if its runs differ."""
    return " to ".join(
        str(n)
        for n in sorted(
            {min(run.rounds_done for run in group.runs), max(run.rounds_done for run in group.runs)}
        )
    )


def _client_std(run) -> float:
    """Return the sample standard deviation of the clients' accuracies; NaN for fewer than two."""
    known = run.client_accuracy[~np.isnan(run.client_accuracy)]
    return float(known.std(ddof=1)) if len(known) > 1 else np.nan


def _format_stage(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 1 else format_number(seconds)


def _format_tflop(number: float) -> str:
    prefix, size = unit_prefix(1e12 * number)
    return f"{1e12 * number / size:.3g} {prefix}FLOP"


def _format_gain(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _format_effective_rank(rank: float) -> str:
    return f"{rank:.2f}"


def _format_rank(rank: float) -> str:
    return f"{rank:g}"
