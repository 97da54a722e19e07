"""The paper's figures, drawn from our runs. matplotlib is imported only when a figure is drawn."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.extras import extra_imports
from ..store.files import replace_file
from . import costs
from .results import Result
from .sheet import Cell, accuracy_by_client, mean_drift

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
OTHER_COLORS = (BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#BCA600", GREY)


def save_figure(figure: "Figure", path: Path, root: Path | None = None) -> None:
    """Write a figure as a PNG. For ``root`` see ``replace_file``."""
    with replace_file(path, root) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight", pad_inches=0.1)


def lora_rank_heatmap(cells: Sequence[Cell], title: str) -> "Figure":
    """Table 2 as a heat map: x is R_c, y is R_l, colour and number are the best accuracy."""
    figure, axes = _new_axes(title, (5.6, 4.6))
    accuracy_at = {
        (c.entry.algorithm["conv_rank"], c.entry.algorithm["linear_rank"]): c.best.mean
        for c in cells
    }
    xs, ys = (sorted({ranks_pair[axis] for ranks_pair in accuracy_at}) for axis in (0, 1))
    grid = np.array([[accuracy_at.get((x, y), np.nan) for x in xs] for y in ys])
    image = axes.imshow(grid, cmap="cividis", origin="lower")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)

    def format_percents(ratios):
        return [f"{ratio:.0%}" for ratio in ratios]

    axes.set_xticks(range(len(xs)), format_percents(xs))
    axes.set_yticks(range(len(ys)), format_percents(ys))
    axes.set(xlabel="R_c, rank of the convolutions", ylabel="R_l, rank of the classifier")
    figure.colorbar(image, label="best accuracy / %")
    return figure


def epochs_figure(cells: Sequence[Cell], title: str) -> "Figure":
    """Figure 4: x is E_lora, y is the best accuracy with its standard deviation over seeds."""
    figure, axes = _new_axes(title)
    finished = [c for c in cells if c.num_seeds]
    xs = [c.entry.algorithm["lora_epochs"] for c in finished]
    means, stds = [c.best.mean for c in finished], np.nan_to_num([c.best.std for c in finished])
    axes.errorbar(xs, means, stds, color=BLUE, marker="o", capsize=3)
    for x, mean in zip(xs, means, strict=True):
        axes.annotate(f"{mean:.1f}", (x, mean), (6, 6), textcoords="offset points", color=BLUE)
    axes.set(xlabel="E_lora, epochs of the low-rank part (of 5)", ylabel="best accuracy / %")
    return figure


def drift_figure(results: Mapping[str, Sequence[Result]], title: str) -> "Figure":
    """Figure 6: x is the round, y is the distance of the clients' sigma from their mean."""
    figure, axes = _new_axes(title)
    for label, color, style in (("simultaneous", ORANGE, "--"), ("alternating", BLUE, "-")):
        if seeds := results.get(label):
            curve = mean_drift(seeds)
            axes.plot(np.arange(1, len(curve) + 1), curve, style, color=color)
            axes.annotate(
                f" {label}",
                (len(curve), curve[-1]),
                color=color,
                va="center",
                annotation_clip=False,
            )
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # MaxNLocator
    axes.set(
        xlabel="round",
        ylabel="drift: RMS distance of sigma_i\nfrom their mean (L2)",
        xlim=(0, None),
        ylim=(0, None),
    )
    return figure


def client_scatter(results: Mapping[str, Sequence[Result]], title: str) -> "Figure":
    """Figure 7: one point per client. Above the diagonal, FedLoRA is more accurate."""
    figure, axes = _new_axes(title, (5.2, 5.2))
    accuracies = accuracy_by_client(results).values()
    for key, label, color, marker in (
        ("fedavg", "FedAvg", ORANGE, "^"),
        ("local", "Local", BLUE, "o"),
    ):
        if accuracies:
            x, y = (
                np.concatenate([columns[name] for columns in accuracies])
                for name in (key, "fedlora")
            )
            axes.scatter(
                x,
                y,
                22,
                color=color,
                marker=marker,
                alpha=0.7,
                linewidths=0,
                label=f"against {label}",
            )
    axes.plot((0, 100), (0, 100), color=GREY, linewidth=0.8)
    axes.annotate("equal", (4, 4), (0, 8), textcoords="offset points", color=GREY, rotation=45)
    axes.set(
        xlabel="client's accuracy with the other method / %",
        ylabel="client's accuracy with FedLoRA / %",
    )
    axes.set(xlim=(0, 101), ylim=(0, 101), aspect="equal")
    axes.legend(frameon=False, loc="lower right")
    return figure


def accuracy_by_cost(
    cost: str, cells: Sequence[Cell], results: costs.ResultsByMethod, title: str
) -> "Figure":
    """The accuracy of each method against its total ``cost`` so far. A method without cost has no
    curve.

    ``cost`` is a field of ``costs.Cost``.
    """
    figure, axes = _new_axes(title)
    colors = iter(OTHER_COLORS * len(cells))
    styles = {}
    ours = costs.own_cell(cells)
    for cell in cells:
        is_ours = cell is ours
        color = ORANGE if is_ours else next(colors)
        styles[color] = style = "-" if color not in styles else "--"
        if not (seeds := results[cell.entry.key]):
            continue
        curve, (unit, _) = costs.Curve.seed_mean(seeds), costs.UNITS[cost]
        if (x := getattr(curve, cost) / unit).any():
            line_style: dict[str, Any] = {
                "color": color,
                "linestyle": style,
                "linewidth": 2.4 if is_ours else 1.2,
                "zorder": 3 if is_ours else 2,
            }
            axes.plot(x, curve.accuracy, label=cell.entry.label, **line_style)
    if cost != "rounds":
        axes.set_xscale("log")
    axes.set(xlabel=_COST_LABELS[cost], ylabel="accuracy / %")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def gains_figure(cells: Sequence[Cell], results: costs.ResultsByMethod, title: str) -> "Figure":
    """pFedLoRA's Figure 5: one bar per client and seed, the largest gain first."""
    figure, axes = _new_axes(title)
    rival, gains_of = costs.best_baseline(cells), costs.client_gains(cells, results)
    sorted_gains = np.sort(np.concatenate([np.zeros(0), *gains_of.values()]))[::-1]
    axes.bar(
        np.arange(1, len(sorted_gains) + 1),
        sorted_gains,
        width=0.8,
        color=[ORANGE if value > 0 else GREY for value in sorted_gains],
    )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # MaxNLocator
    label = rival.entry.label if rival else "best baseline"
    axes.set(xlabel="client, by its gain", ylabel=f"pFedLoRA less {label} / percentage points")
    return figure


_COST_LABELS = {
    "rounds": "round",
    "bytes": "sent up and down, all clients / MB",
    "flops": "local training, all clients / TFLOP",
}


def _new_axes(title: str, inches: tuple[float, float] = (6.4, 4.0)) -> "tuple[Figure, Axes]":
    """An empty plot. Raises ValueError if matplotlib is missing."""
    with extra_imports("matplotlib", "analysis", "the picture"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, 70), fontsize="medium")
    if inches[0] > 6:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
