"""Choose the looks of groups in figures.

If there are more groups than a figure can name, only the best and the worst few have a look of
their own; the others are grey.
"""

from collections.abc import Sequence

import numpy as np

from ..groups import Group
from .style import COLORS, DASHES, Look, distinct_looks

MAX_LOOKS = 24  # up to so many groups, each has a look of its own
NUM_BEST, NUM_WORST = 8, 4
PALE = "#C4C4C4"


def assign_looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Return {label: look} of the groups.

    If there are several methods, each has a colour and each of its settings a dash pattern. With
    too many of either, or with one method, neighbouring groups have different colours.
    """
    named = list(groups) if len(groups) <= MAX_LOOKS else best_and_worst(groups)
    look_of = dict.fromkeys((group.label for group in groups), Look(PALE, "-", is_named=False))
    labels_of: dict[str, list[str]] = {}
    for group in named:
        labels_of.setdefault(group.runs[0].algorithm, []).append(group.label)
    most = max(map(len, labels_of.values()))
    if 1 < len(labels_of) <= len(COLORS) and most <= len(DASHES):
        for color, labels in zip(COLORS, labels_of.values(), strict=False):
            look_of |= {
                label: Look(color, dash) for label, dash in zip(labels, DASHES, strict=False)
            }
        return look_of
    looks = distinct_looks(len(named))
    return look_of | {group.label: look for group, look in zip(named, looks, strict=True)}


def best_and_worst(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with the best and the worst final accuracy, in the order of ``groups``.

    Accuracies of different tasks are not comparable, so the tasks take turns: first the best of
    each, then the second of each, and so on. If no group has an accuracy, the first groups are
    returned.
    """
    places: dict[int, tuple[int, int]] = {}  # place in its task, from the top and from the bottom
    for task in dict.fromkeys(group.task for group in groups):
        finals = {
            index: g.seed_stat(lambda run: run.final).mean
            for index, g in enumerate(groups)
            if g.task == task
        }
        order = sorted(
            (at for at in finals if not np.isnan(finals[at])), key=lambda at: -finals[at]
        )
        places |= {at: (rank, len(order) - 1 - rank) for rank, at in enumerate(order)}
    best = sorted(places, key=lambda at: (places[at][0], at))[:NUM_BEST]
    worst = sorted((at for at in places if at not in best), key=lambda at: (places[at][1], at))[
        :NUM_WORST
    ]
    return [groups[at] for at in sorted([*best, *worst]) or range(NUM_BEST + NUM_WORST)]


def named_groups(groups: Sequence[Group], looks: dict[str, Look]) -> list[Group]:
    """Return the groups that have a look of their own."""
    return [group for group in groups if looks[group.label].is_named]


def caption_note(looks: dict[str, Look], fate: str) -> str:
    """Return the end of a caption if the figure does not name some groups; else "".

    fate: what the figure does with these groups, such as "are grey".
    """
    if all(look.is_named for look in looks.values()):
        return ""
    return (
        f" Of {len(looks)} settings the {NUM_BEST} best and {NUM_WORST} worst in final accuracy "
        f"are named; the others {fate}."
    )
