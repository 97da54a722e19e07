"""Draw how each rank spends its seconds."""

from collections.abc import Sequence

import numpy as np

from ..groups import Group
from .crowd import caption_note, named_groups
from .curves import Looks
from .style import GREY, PageFigure, panels

# train, exchange and evaluate have the colours of ``curves.seconds_by_stage``; waiting is white.
SHADES = {
    "train": "#0072B2",
    "exchange": "#56B4E9",
    "evaluate": "#BBBBBB",
    "other": "#777777",
    "waiting": "#FFFFFF",
}
_MAX_PANELS = 12


def seconds_by_rank(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the seconds of each rank by stage.

    There is a panel for each group, with its first run on several ranks.
    """
    loads = [
        (group, load)
        for group in named_groups(groups, looks)
        if (load := next(filter(None, map(_multi_rank_load, group.runs)), None))
    ]
    if not loads:
        return None
    plotted = loads[:_MAX_PANELS]
    side = (6.2, 2.2) if len(plotted) == 1 else (2.15, 1.5)
    fig, all_axes = panels(
        [(g.label, looks[g.label]) for g, _ in plotted],
        side,
        "rank",
        "seconds per round",
        bottom_space=0.25,
    )
    for axes, (_, load) in zip(all_axes, plotted, strict=True):
        positions, stacked = (
            np.arange(len(load.seconds["train"])),
            np.zeros(len(load.seconds["train"])),
        )
        for stage, seconds in load.seconds.items():
            edge_style = (
                {"edgecolor": GREY, "linewidth": 0.5} if stage == "waiting" else {"linewidth": 0}
            )
            axes.bar(
                positions,
                seconds,
                0.8,
                stacked,
                color=SHADES.get(stage, GREY),
                label=stage,
                **edge_style,
            )
            stacked = stacked + seconds
        if not np.isnan(load.balance):
            axes.annotate(
                f"{load.balance:.0%} balanced",
                (1, 1.01),
                xycoords="axes fraction",
                ha="right",
                fontsize="small",
            )
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # MaxNLocator
    handles, names = all_axes[0].get_legend_handles_labels()
    height = fig.get_size_inches()[1]
    fig.legend(
        handles,
        names,
        loc="lower right",
        ncols=len(names),
        frameon=False,
        borderaxespad=0,
        fontsize="small",
        bbox_to_anchor=(1, 0.05 / height),
    )
    caption = (
        "Mean seconds of a round by rank, of the first seed: its own clients' training and "
        "evaluation, the exchange, what lies between rounds, and waiting in messages. Balanced: "
        "the share of their time for which workers are busy if the busiest sets the pace."
    )
    caption += caption_note(looks, "are in the table of costs")
    caption += (
        f" The first {_MAX_PANELS} of {len(loads)} settings." if len(loads) > _MAX_PANELS else ""
    )
    return PageFigure("ranks", "Where the seconds go, by rank", caption, fig)


def _multi_rank_load(run):
    """Return the load of a run's ranks; None if it had only one or did not measure them."""
    return run.rank_load if run.rank_load and len(run.rank_load.seconds["train"]) > 1 else None
