"""Draw where the seconds of a round go: on the workers, and on each rank."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..groups import Group
from ..load import BUSY, RankLoad
from .crowd import caption_note, named_groups
from .curves import Looks
from .style import GREY, WIDTH, PageFigure, new_figure, panels, wrap_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Purples from dark to pale, which are no method's colour and stay apart in grey print.
STAGE_COLORS = {
    "train": "#4B2E83",
    "exchange": "#8E6BBF",
    "evaluate": "#C3AEE0",
    "other": "#DDDDDD",
    "waiting": "#FFFFFF",
}
_MAX_PANELS = 12


def seconds_by_stage(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the seconds of a round by stage.

    There is a bar for each group, and one more for its slowest worker if it has several workers.
    """
    groups = named_groups(groups, looks)
    seconds = [group.worker_seconds() for group in groups]
    if not any(of_group.median for of_group in seconds):
        return None
    names = [wrap_label(group.label, 44) for group in groups]
    fig = new_figure(WIDTH, 0.95 + sum(max(0.34, 0.17 * (n.count("\n") + 1)) for n in names))
    axes, longest = fig.add_subplot(), 0.0
    for row, (workers, median, slowest) in enumerate(seconds):
        bars = [
            (f"median of {workers} workers", row - 0.19, median),
            ("slowest", row + 0.19, slowest),
        ]
        for name, place, stages in bars if workers > 1 else [("", row, median)]:
            end = draw_stages(axes, np.array([place]), stages, 0.34 if workers > 1 else 0.66)
            busy = sum(stages[stage] for stage in BUSY if stage in stages)
            text = f"{name}: {busy:.3g} s busy" if name else f"{end[0]:.3g} s"
            axes.annotate(
                text,
                (end[0], place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
            )
            longest = max(longest, end[0] * (1.6 if workers > 1 else 1.1))  # room for the text
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds per round / s",
        xlim=(0, longest or 1),
    )
    axes.tick_params(axis="y", length=0)
    fig.legend(
        *_legend_entries(axes), loc="outside upper right", ncols=len(STAGE_COLORS), frameon=False
    )
    caption = (
        "Mean seconds of a round by stage, mean over seeds, on the ranks that train clients: of "
        "several workers the one with the median busy time (training and evaluation) and the "
        "slowest. White is waiting for other ranks. Runs on different or busy machines are not "
        "comparable."
    )
    if any(of_group.workers == 0 for of_group in seconds):
        caption += " Older runs have only the clock of rank 0, whose waiting counts as exchange."
    caption += caption_note(looks, "are in the table of seconds")
    return PageFigure("seconds", "Where the seconds go", caption, fig)


def seconds_by_rank(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the seconds of each rank by stage.

    There is a panel for each group, with its first run on several ranks.
    """
    loads = []
    for group in named_groups(groups, looks):
        of_group = [run.rank_load for run in group.runs if run.rank_load]
        loads += [(group.label, load) for load in of_group if len(load.seconds["train"]) > 1][:1]
    if not loads:
        return None
    plotted = loads[:_MAX_PANELS]
    titles = [(label + _format_balance(load), looks[label]) for label, load in plotted]
    size = (6.2, 2.2) if len(plotted) == 1 else (2.15, 1.5)
    fig, all_axes = panels(titles, size, "rank", "seconds per round / s", bottom_space=0.25)
    for axes, (_, load) in zip(all_axes, plotted, strict=True):
        ranks = np.arange(len(load.seconds["train"]))
        draw_stages(axes, ranks, load.seconds, 0.8, is_vertical=True)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # MaxNLocator
    fig.legend(
        *_legend_entries(all_axes[0]), loc="lower right", ncols=len(plotted[0][1].seconds),
        frameon=False, borderaxespad=0, fontsize="small",
        bbox_to_anchor=(1, 0.05 / fig.get_size_inches()[1]),
    )  # fmt: skip
    caption = (
        "Mean seconds of a round by rank, of the first seed: its own clients' training and "
        "evaluation, the exchange, what lies between rounds, and waiting in messages. Balanced: "
        "the share of their time for which workers are busy if the busiest sets the pace."
    )
    caption += caption_note(looks, "are in the table of seconds")
    if len(loads) > _MAX_PANELS:
        caption += f" The first {_MAX_PANELS} of {len(loads)} settings."
    return PageFigure("ranks", "Where the seconds go, by rank", caption, fig)


def draw_stages(
    axes: "Axes",
    places: np.ndarray,
    stages: Mapping[str, Any],
    width: float,
    is_vertical: bool = False,
) -> np.ndarray:
    """Draw a stacked bar at each of ``places`` [n], and return their lengths [n].

    stages: {stage: seconds [n], or a number}; width: of a bar.
    """
    ends = np.zeros(len(places))
    for stage, seconds in stages.items():
        style: dict[str, Any] = {"color": STAGE_COLORS.get(stage, GREY), "label": stage}
        if stage == "waiting":
            style |= {"edgecolor": GREY, "linewidth": 0.5 if np.any(seconds) else 0}
        draw_bars = axes.bar if is_vertical else axes.barh
        draw_bars(places, seconds, width, ends, **style)
        ends = ends + np.nan_to_num(seconds)
    return ends


def _format_balance(load: RankLoad) -> str:
    return "" if np.isnan(load.balance) else f", {load.balance:.0%} balanced"


def _legend_entries(axes: "Axes") -> tuple[list, list[str]]:
    """Return (handles, names) of the stages that bars show, each once."""
    handles, names = axes.get_legend_handles_labels()
    entry_of = dict(zip(names, handles, strict=True))
    return list(entry_of.values()), list(entry_of)
