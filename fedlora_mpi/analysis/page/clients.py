"""Draw figures with a point for each client.

They show the clients' accuracies, one method against another, and which data each client holds.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...data.partition import PARTITIONS, Split
from ..groups import Group, RunLog, count_clients, count_seeds, format_setting
from ..method_names import paper_name
from ..paired import paired_runs
from ..partition_table import figure as dots
from .crowd import caption_note, named_groups
from .curves import Looks
from .style import GREY, WIDTH, Look, PageFigure, new_figure, panels, wrap_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIVALS = ("fedavg", "local")
_MARKERS = {"fedavg": ("^", "▲"), "local": ("o", "●")}  # mark in a plot, and as text
_PARTITION_KEYS = ("alpha", "classes_per_client", "clients", "seed")
_MAX_VECTOR_POINTS = 3000  # a plot with more points draws them as an image
_MAX_SPLITS, _MAX_PANELS = 4, 12  # largest numbers of figures and of panels


class RivalPair(NamedTuple):
    """Two methods on the same clients, for the seeds that both have."""

    group: Group
    rival: Group
    seeds: int
    group_accuracy: np.ndarray  # [seeds N] accuracy of each client's own model, fractions
    rival_accuracy: np.ndarray


def client_distribution(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw each client's accuracy in the last evaluated round, with a row for each group."""
    accuracies = [
        (g, np.concatenate([run.client_accuracy for run in g.runs]))
        for g in named_groups(groups, looks)
    ]
    accuracies = [(g, 100 * accuracy[~np.isnan(accuracy)]) for g, accuracy in accuracies]
    accuracies = [(g, accuracy) for g, accuracy in accuracies if len(accuracy)]
    if not accuracies:
        return None
    fig = new_figure(WIDTH, 0.7 + 0.34 * len(accuracies))
    axes = fig.add_subplot()
    for row, (group, accuracy) in enumerate(accuracies):
        look = looks[group.label]
        jittered = 0.28 * (2 * _golden_jitter(len(accuracy)) - 1)
        is_dense = len(accuracy) * len(accuracies) > _MAX_VECTOR_POINTS
        axes.scatter(
            accuracy,
            row + jittered,
            9,
            color=look.color,
            alpha=0.45,
            linewidths=0,
            rasterized=is_dense,
        )
        axes.plot(
            [accuracy.mean()] * 2,
            [row - 0.38, row + 0.38],
            color="black",
            linewidth=1.6,
            solid_capstyle="butt",
        )
    axes.set_yticks(
        range(len(accuracies)), [wrap_label(group.label, 44) for group, _ in accuracies]
    )
    axes.set(ylim=(len(accuracies) - 0.5, -0.5), xlabel="accuracy of a client's own model / %")
    axes.tick_params(axis="y", length=0)
    caption = (
        f"Each dot is a client of one seed ({count_clients(groups)}, {count_seeds(groups)}) in its "
        "run's last evaluated round; the black line is the mean. The height of a dot in its row "
        "means nothing."
    ) + caption_note(looks, "are in the table of accuracies")
    return PageFigure("clients", "Distribution over clients", caption, fig)


def rival_pairs(groups: Sequence[Group]) -> list[RivalPair]:
    """Pair every group with FedAvg and with Local, on the same clients and with as many rounds.

    Of several candidates, the one with the most equal settings is taken.
    """
    pairs_found = []
    for group in (group for group in groups if group.runs[0].algorithm not in RIVALS):
        for name in RIVALS:
            candidates = [
                pair
                for rival in groups
                if rival.runs[0].algorithm == name and (pair := _make_pair(group, rival))
            ]
            if candidates:
                pairs_found.append(
                    max(candidates, key=lambda pair: _num_equal_settings(group, pair.rival))
                )
    return pairs_found


def rival_scatter(all_pairs: Sequence[RivalPair], looks: Looks) -> PageFigure | None:
    """Draw each method's clients against FedAvg and Local, as in FedLoRA's Figure 7."""
    by_group: dict[str, list[RivalPair]] = {}
    for pair in all_pairs:
        by_group.setdefault(pair.group.label, []).append(pair)
    shown = sorted(by_group.items(), key=lambda item: not looks[item[0]].is_named)[:_MAX_PANELS]
    if not shown:
        return None
    side = 3.2 if len(shown) == 1 else 2.1
    titles = [(label, looks[label]) for label, _ in shown]
    fig, all_axes = panels(
        titles,
        (side, side),
        "accuracy with FedAvg or Local / %",
        "accuracy with the method above / %",
    )
    accuracies = [(p.group_accuracy, p.rival_accuracy) for _, members in shown for p in members]
    worst = min(accuracy.min() for pair in accuracies for accuracy in pair)
    low = min(90, 10 * int(10 * worst))  # where both axes begin, percent
    ticks = range(low, 100, 10 if low >= 60 else 20)  # 100 would touch the next panel's ticks
    for axes, (_, members) in zip(all_axes, shown, strict=True):
        axes.plot((low, 100), (low, 100), color=GREY, linewidth=0.7)
        for index, pair in enumerate(members):
            _scatter_pair(axes, pair, looks[pair.rival.label], 0.04 + 0.08 * index)
        axes.set(xlim=(low, 101), ylim=(low, 101), xticks=ticks, yticks=ticks)
    groups = [pair.group for _, members in shown for pair in members]
    caption = (
        f"Each mark is a client of one seed ({count_clients(groups)}, {count_seeds(groups)}), both "
        "methods in their last evaluated rounds; above the line the method named over the panel "
        "serves it better. The numbers count the clients that it serves at least as well."
    )
    caption += f" {_MAX_PANELS} of {len(by_group)} methods." if len(by_group) > _MAX_PANELS else ""
    return PageFigure("against", "Each client against FedAvg and Local", caption, fig)


def _scatter_pair(axes: "Axes", pair: RivalPair, look: Look, text_height: float) -> None:
    """Draw the clients of a pair in the rival's colour, and the number served as well or better.

    text_height: place of the number, as a fraction of the plot's height.
    """
    rival = pair.rival.runs[0].algorithm
    marker, symbol = _MARKERS[rival]
    axes.scatter(
        100 * pair.rival_accuracy, 100 * pair.group_accuracy, 14, color=look.color, marker=marker,
        alpha=0.6, linewidths=0, rasterized=len(pair.group_accuracy) > _MAX_VECTOR_POINTS,
    )  # fmt: skip
    axes.annotate(
        f"{symbol} {paper_name(rival)}: {num_as_good(pair)} of {len(pair.group_accuracy)}",
        (0.97, text_height), xycoords="axes fraction", ha="right", color=look.ink, fontsize="small",
    )  # fmt: skip


def num_as_good(pair: RivalPair) -> int:
    """Return the number of clients whose accuracy is at least as high as with the rival."""
    return int(np.count_nonzero(pair.group_accuracy >= pair.rival_accuracy))


def partition_figures(groups: Sequence[Group]) -> list[PageFigure]:
    """Draw which data each client holds, as in FedLoRA's Figure 5.

    There is a figure for each of the first four splits of the data.
    """
    by_digest: dict[str, list[RunLog]] = {}
    for run in (run for group in groups for run in group.runs):
        if len(run.partition.get("train_counts", ())):
            by_digest.setdefault(run.partition["digest"], []).append(run)
    figures = []
    for number, members in enumerate(list(by_digest.values())[:_MAX_SPLITS], 1):
        stored, config = members[0].partition, members[0].config["data"]
        split = Split(
            tuple(stored["train"]),
            tuple(stored["test"]),
            stored["train_counts"],
            stored["test_counts"],
        )
        fig = dots(split)
        fig.axes[0].set_title("")
        fig.axes[0].collections[0].set_rasterized(
            bool(np.count_nonzero(split.train_counts) > _MAX_VECTOR_POINTS)
        )
        caption = (
            f"Training samples of {config['dataset']} by client and class, as the area of a dot. "
            f"{_describe_partition(config['partition'])} {len(members)} of "
            f"{sum(map(len, by_digest.values()))} runs have this split."
        )
        caption += (
            f" There are {len(by_digest)} splits; the first {_MAX_SPLITS} are shown."
            if len(by_digest) > _MAX_SPLITS
            else ""
        )
        name = "partition" if len(by_digest) == 1 else f"partition-{number}"
        title = "Who holds which data" + (f", split {number}" if len(by_digest) > 1 else "")
        figures.append(PageFigure(name, title, caption, fig))
    return figures


def _describe_partition(config: Mapping[str, Any]) -> str:
    """Return what the rule of a partition says of itself, and its settings."""
    rule = PARTITIONS.get(config["kind"])
    said = " ".join((rule.__doc__ or "").partition("\n")[0].split()) if rule else config["kind"]
    settings = [f"{key} {format_setting(config[key])}" for key in _PARTITION_KEYS if key in config]
    return f"{said} Here {', '.join(settings)}."


def _make_pair(group: Group, rival: Group) -> RivalPair | None:
    """Pair the runs of two groups that have equal seeds and equal splits.

    Returns None if there are none, or if the numbers of rounds differ.
    """
    group_accuracy, rival_accuracy = [], []
    if group.runs[0].config["rounds"] != rival.runs[0].config["rounds"]:
        return None
    for run, rival_run in paired_runs(group, rival):
        a, b = run.client_accuracy, rival_run.client_accuracy
        is_known = ~np.isnan(a + b)
        group_accuracy.append(a[is_known])
        rival_accuracy.append(b[is_known])
    return (
        RivalPair(
            group,
            rival,
            len(group_accuracy),
            np.concatenate(group_accuracy),
            np.concatenate(rival_accuracy),
        )
        if group_accuracy
        else None
    )


def _num_equal_settings(group: Group, rival: Group) -> int:
    """Return the number of equal settings, without those of the methods."""
    group_settings, rival_settings = group.runs[0].settings, rival.runs[0].settings
    return sum(
        group_settings[k] == rival_settings.get(k)
        for k in group_settings
        if not k.startswith("algorithm.")
    )


def _golden_jitter(number: int) -> np.ndarray:
    """Return [number] values in [0, 1), evenly spread but unordered.

    They are multiples of the golden ratio, modulo 1.
    """
    return np.arange(number) * 0.6180339887498949 % 1
