"""More settings than a figure can name: the best and the worst few are told apart, the others are
grey.
"""

from collections.abc import Sequence

import numpy as np

from ..groups import Group
from .style import Look, looks

CROWD = 24  # up to so many settings all have a look of their own
BEST, WORST = 8, 4
PALE = "#C4C4C4"


def looks_of(groups: Sequence[Group]) -> dict[str, Look]:
    """The look of each group by its label."""
    few = list(groups) if len(groups) <= CROWD else few_of(groups)
    found = dict.fromkeys((group.label for group in groups), Look(PALE, "-", named=False))
    return found | dict(zip((group.label for group in few), looks(len(few)), strict=True))


def few_of(groups: Sequence[Group]) -> list[Group]:
    """The best and the worst in final accuracy, in the order of ``groups``; of several tasks each
    in turn, for accuracies of different tasks do not compare. The first ones where none has an
    accuracy.
    """
    place: dict[int, tuple[int, int]] = {}  # from the top and from the bottom of the own task
    for task in dict.fromkeys(group.task for group in groups):
        finals = {
            at: g.over(lambda run: run.final).mean for at, g in enumerate(groups) if g.task == task
        }
        order = sorted(
            (at for at in finals if not np.isnan(finals[at])), key=lambda at: -finals[at]
        )
        place |= {at: (rank, len(order) - 1 - rank) for rank, at in enumerate(order)}
    best = sorted(place, key=lambda at: (place[at][0], at))[:BEST]
    worst = sorted((at for at in place if at not in best), key=lambda at: (place[at][1], at))[
        :WORST
    ]
    return [groups[at] for at in sorted([*best, *worst]) or range(BEST + WORST)]


def named(groups: Sequence[Group], looks: dict[str, Look]) -> list[Group]:
    """Those with a look of their own."""
    return [group for group in groups if looks[group.label].named]


def note(looks: dict[str, Look], rest: str) -> str:
    """The end of a caption where some have none; ``rest``: what became of those."""
    if all(look.named for look in looks.values()):
        return ""
    return f" Of {len(looks)} settings the {BEST} best and {WORST} worst in final accuracy are named; the others {rest}."
