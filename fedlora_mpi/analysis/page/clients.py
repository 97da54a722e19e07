"""Figures with a point for each client: accuracies, one method against another, who holds which
data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...data.partition import Split
from ..groups import Group, Logged
from ..partition_table import figure as dots
from .crowd import named, note
from .curves import Looks
from .style import GREY, WIDTH, Drawn, figure, panels, wrapped

RIVALS = ("fedavg", "local")
_MANY = 3000  # points of one plot that are drawn as an image
_SPLITS, _PAIRS = 4, 12  # figures, panels


class Pair(NamedTuple):
    """Two methods on the same clients, over the seeds that both have."""

    group: Group
    rival: Group
    seeds: int
    mine: np.ndarray  # [seeds N] accuracy of each client's own model, fractions
    theirs: np.ndarray


def distribution(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """The accuracy of every client at the end, a row for each group."""
    found = [
        (g, np.concatenate([run.client_accuracy for run in g.runs])) for g in named(groups, looks)
    ]
    found = [(g, 100 * accuracy[~np.isnan(accuracy)]) for g, accuracy in found]
    found = [(g, accuracy) for g, accuracy in found if len(accuracy)]
    if not found:
        return None
    drawn = figure(WIDTH, 0.7 + 0.34 * len(found))
    axes = drawn.add_subplot()
    for row, (group, accuracy) in enumerate(found):
        look = looks[group.label]
        beside = 0.28 * (2 * _scatter(len(accuracy)) - 1)
        many = len(accuracy) * len(found) > _MANY
        axes.scatter(
            accuracy, row + beside, 9, color=look.color, alpha=0.45, linewidths=0, rasterized=many
        )
        axes.plot(
            [accuracy.mean()] * 2,
            [row - 0.38, row + 0.38],
            color="black",
            linewidth=1.6,
            solid_capstyle="butt",
        )
    axes.set_yticks(range(len(found)), [wrapped(group.label, 44) for group, _ in found])
    axes.set(ylim=(len(found) - 0.5, -0.5), xlabel="accuracy of a client's own model / %")
    axes.tick_params(axis="y", length=0)
    said = "Each dot is a client of one seed in its run's last evaluated round; the black line is the mean. The "
    said += "height of a dot in its row means nothing." + note(
        looks, "are in the table of accuracies"
    )
    return Drawn("clients", "Distribution over clients", said, drawn)


def pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every group with the FedAvg and the Local of as many rounds on the same clients: of several,
    that with the most equal settings.
    """
    found = []
    for group in (group for group in groups if group.runs[0].algorithm not in RIVALS):
        for name in RIVALS:
            there = [
                pair
                for rival in groups
                if rival.runs[0].algorithm == name and (pair := _pair(group, rival))
            ]
            if there:
                found.append(max(there, key=lambda pair: _alike(group, pair.rival)))
    return found


def against(found: Sequence[Pair], looks: Looks) -> Drawn | None:
    """FedLoRA's Figure 7."""
    by_group: dict[str, list[Pair]] = {}
    for pair in found:
        by_group.setdefault(pair.group.label, []).append(pair)
    shown = sorted(by_group.items(), key=lambda of: not looks[of[0]].named)[:_PAIRS]
    if not shown:
        return None
    side = 3.2 if len(shown) == 1 else 2.1
    titles = [(label, looks[label]) for label, _ in shown]
    drawn, every = panels(
        titles,
        (side, side),
        "accuracy with the other method / %",
        "accuracy with the named one / %",
    )
    markers = dict(zip(RIVALS, (("^", "#D55E00"), ("o", "#0072B2")), strict=True))
    for axes, (_, members) in zip(every, shown, strict=True):
        axes.plot((0, 100), (0, 100), color=GREY, linewidth=0.7)
        for at, pair in enumerate(members):
            marker, color = markers[pair.rival.runs[0].algorithm]
            x, y, many = 100 * pair.theirs, 100 * pair.mine, len(pair.mine) > _MANY
            axes.scatter(
                x, y, 14, color=color, marker=marker, alpha=0.6, linewidths=0, rasterized=many
            )
            text = f"{'▲' if marker == '^' else '●'} {pair.rival.runs[0].algorithm}: {as_good(pair)} of {len(x)}"
            axes.annotate(text, (97, 4 + 8 * at), ha="right", color=color, fontsize="small")
        axes.set(xlim=(0, 101), ylim=(0, 101), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
    said = (
        "Each mark is a client (of one seed), both methods in their last evaluated rounds; above the line the one "
        "named over the panel serves it better. The numbers count the clients that it serves at least as well."
    )
    said += f" {_PAIRS} of {len(by_group)} methods." if len(by_group) > _PAIRS else ""
    return Drawn("against", "Each client against FedAvg and Local", said, drawn)


def as_good(pair: Pair) -> int:
    """How many clients the method serves at least as well as its rival."""
    return int(np.count_nonzero(pair.mine >= pair.theirs))


def partitions(groups: Sequence[Group]) -> list[Drawn]:
    """FedLoRA's Figure 5, a figure for each split of the data, the first four."""
    by_digest: dict[str, list[Logged]] = {}
    for run in (run for group in groups for run in group.runs):
        if len(run.partition.get("train_counts", ())):
            by_digest.setdefault(run.partition["digest"], []).append(run)
    found = []
    for number, members in enumerate(list(by_digest.values())[:_SPLITS], 1):
        at, config = members[0].partition, members[0].config["data"]
        split = Split(tuple(at["train"]), tuple(at["test"]), at["train_counts"], at["test_counts"])
        drawn = dots(split)
        drawn.axes[0].set_title("")
        drawn.axes[0].collections[0].set_rasterized(np.count_nonzero(split.train_counts) > _MANY)
        kind = config["partition"]
        alpha = f", alpha {kind['alpha']:g}" if "alpha" in kind else ""
        said = (
            f"Training samples of {config['dataset']} by client and class, as the area of a dot: "
            f"{kind['kind']}{alpha}, seed {kind['seed']}; the split of {len(members)} of "
            f"{sum(map(len, by_digest.values()))} runs."
        )
        said += (
            f" There are {len(by_digest)} splits; the first {_SPLITS} are shown."
            if len(by_digest) > _SPLITS
            else ""
        )
        name = "partition" if len(by_digest) == 1 else f"partition-{number}"
        title = "Who holds which data" + (f", split {number}" if len(by_digest) > 1 else "")
        found.append(Drawn(name, title, said, drawn))
    return found


def _pair(group: Group, rival: Group) -> Pair | None:
    """The two over runs with equal seeds and equal splits; None where there are none."""
    mine, theirs = [], []
    if group.runs[0].config["rounds"] != rival.runs[0].config["rounds"]:
        return None
    for run in group.runs:
        for other in rival.runs:
            alike = run.seeds == other.seeds and run.partition.get("digest") == other.partition.get(
                "digest"
            )
            a, b = run.client_accuracy, other.client_accuracy
            if alike and len(a) == len(b) > 0:
                there = ~np.isnan(a + b)
                mine.append(a[there])
                theirs.append(b[there])
    return (
        Pair(group, rival, len(mine), np.concatenate(mine), np.concatenate(theirs))
        if mine
        else None
    )


def _alike(group: Group, rival: Group) -> int:
    """How many settings outside of the methods' own are equal."""
    mine, theirs = group.runs[0].settings, rival.runs[0].settings
    return sum(mine[k] == theirs.get(k) for k in mine if not k.startswith("algorithm."))


def _scatter(number: int) -> np.ndarray:
    """[number] from 0 to 1, evenly and without order: multiples of the golden section."""
    return np.arange(number) * 0.6180339887498949 % 1
