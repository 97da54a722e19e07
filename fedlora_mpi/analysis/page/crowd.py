"""More settings than a figure can name: the best and the worst few are told apart, the others are
grey.
"""

from collections.abc import Sequence

import numpy as np

from ..groups import Group
from .style import Look, distinct_looks

MAX_LOOKS = 24  # up to so many settings all have a look of their own
NUM_BEST, NUM_WORST = 8, 4
PALE = "#C4C4C4"


def assign_looks(groups: Sequence[Group]) -> dict[str, Look]:
    """The look of each group by its label."""
    named = list(groups) if len(groups) <= MAX_LOOKS else best_and_worst(groups)
    look_of = dict.fromkeys((group.label for group in groups), Look(PALE, "-", is_named=False))
    return look_of | dict(
        zip((group.label for group in named), distinct_looks(len(named)), strict=True)
    )


def best_and_worst(groups: Sequence[Group]) -> list[Group]:
    """The best and the worst in final accuracy, in the order of ``groups``; of several tasks each
    in turn, for accuracies of different tasks do not compare. The first ones where none has an
    accuracy.
    """
    places: dict[int, tuple[int, int]] = {}  # from the top and from the bottom of the own task
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
    """Those with a look of their own."""
    return [group for group in groups if looks[group.label].is_named]


def caption_note(looks: dict[str, Look], fate: str) -> str:
    """The end of a caption where some have no name; ``fate``: what became of those."""
    if all(look.is_named for look in looks.values()):
        return ""
    return (
        f" Of {len(looks)} settings the {NUM_BEST} best and {NUM_WORST} worst in final accuracy "
        f"are named; the others {fate}."
    )
