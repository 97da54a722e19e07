"""Where the seconds of each rank went."""

from collections.abc import Sequence

import numpy as np

from ..groups import Group
from .crowd import named, note
from .curves import Looks
from .style import GREY, Drawn, panels

# As the stages of ``curves.stages``; waiting is empty.
SHADES = {
    "train": "#0072B2",
    "exchange": "#56B4E9",
    "evaluate": "#BBBBBB",
    "other": "#777777",
    "waiting": "#FFFFFF",
}
_PANELS = 12


def ranks(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """A panel for each group, of its first run that had several ranks."""
    found = [
        (group, load)
        for group in named(groups, looks)
        if (load := next(filter(None, map(_several, group.runs)), None))
    ]
    if not found:
        return None
    shown = found[:_PANELS]
    side = (6.2, 2.2) if len(shown) == 1 else (2.15, 1.5)
    drawn, every = panels(
        [(g.label, looks[g.label]) for g, _ in shown], side, "rank", "seconds per round", below=0.25
    )
    for axes, (_, load) in zip(every, shown, strict=True):
        at, below = np.arange(len(load.seconds["train"])), np.zeros(len(load.seconds["train"]))
        for stage, seconds in load.seconds.items():
            rim = {"edgecolor": GREY, "linewidth": 0.5} if stage == "waiting" else {"linewidth": 0}
            axes.bar(at, seconds, 0.8, below, color=SHADES.get(stage, GREY), label=stage, **rim)
            below = below + seconds
        if not np.isnan(load.balance):
            where = {"xycoords": "axes fraction", "ha": "right", "fontsize": "small"}
            axes.annotate(f"{load.balance:.0%} balanced", (1, 1.01), **where)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, names = every[0].get_legend_handles_labels()
    height = drawn.get_size_inches()[1]
    drawn.legend(
        handles,
        names,
        loc="lower right",
        ncols=len(names),
        frameon=False,
        borderaxespad=0,
        fontsize="small",
        bbox_to_anchor=(1, 0.05 / height),
    )
    said = (
        "Mean seconds of a round by rank, of the first seed: its own clients' training and evaluation, the exchange, what "
        "lies between rounds, and waiting in messages. Balanced: the share of their time for which workers are busy if the "
        "busiest sets the pace."
    )
    said += note(looks, "are in the table of costs")
    said += f" The first {_PANELS} of {len(found)} settings." if len(found) > _PANELS else ""
    return Drawn("ranks", "Where the seconds go, by rank", said, drawn)


def _several(run):
    """The load of a run, None of one rank."""
    return run.load if run.load and len(run.load.seconds["train"]) > 1 else None
