"""Figures of numeric settings: one that differs is an axis, two that differ on a grid are a heat
map.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..groups import Group, number, short, shown
from .style import COLORS, DASHES, WIDTH, Drawn, Look, figure, label_ends, tall_enough

_SHARE = 0.75  # of the cells of a grid that are there


class Series(NamedTuple):
    """Groups that differ in nothing but some settings; ``label``: what sets them apart from other
    series.
    """

    label: str
    groups: list[Group]


def series(groups: Sequence[Group], keys: Sequence[str], axes: Sequence[str]) -> list[Series]:
    """The groups that have numbers for ``axes``, together where all other settings are equal; two
    values at least.
    """
    found: dict[str, list[Group]] = {}
    others = [key for key in keys if key not in axes]
    for group in groups:
        if all(number(group.settings.get(axis)) for axis in axes):
            found.setdefault(repr([group.settings.get(key) for key in others]), []).append(group)
    found = {name: members for name, members in found.items() if len(members) > 1}
    apart = [
        k
        for k in others
        if len({repr(members[0].settings.get(k)) for members in found.values()}) > 1
    ]
    return [Series(_label(members[0], apart, keys), members) for members in found.values()]


def grids(groups: Sequence[Group], keys: Sequence[str]) -> tuple[list[Drawn], set[str]]:
    """FedLoRA's Table 2 as a heat map, for every two settings on a grid; and the settings that are
    in one.
    """
    drawn, used = [], set()
    for pair in combinations([key for key in keys if _numeric(groups, key)], 2):
        for one in series(groups, keys, pair):
            xs, ys = (sorted({group.settings[axis] for group in one.groups}) for axis in pair)
            if min(len(xs), len(ys)) > 1 and len(one.groups) >= _SHARE * len(xs) * len(ys):
                number_ = f"-{len(drawn) + 1}" if drawn else ""
                drawn.append(_grid(f"grid{number_}", one, pair, (xs, ys), keys))
                used |= set(pair)
    return drawn, used


def sweeps(groups: Sequence[Group], keys: Sequence[str], but: set[str]) -> list[Drawn]:
    """FedLoRA's Figure 4: final and best accuracy over each numeric setting that differs alone."""
    drawn = []
    for key in (key for key in keys if key not in but and _numeric(groups, key)):
        if found := series(groups, keys, [key]):
            drawn.append(_sweep(key, found, keys))
    names = Counter(each.name for each in drawn)
    return [
        each._replace(name=f"{each.name}-{n}") if names[each.name] > 1 else each
        for n, each in enumerate(drawn, 1)
    ]


def _sweep(key: str, found: Sequence[Series], keys: Sequence[str]) -> Drawn:
    height = tall_enough([one.label for one in found])
    drawn = figure(WIDTH, height)
    axes, ends, name = drawn.add_subplot(), [], short(key, keys)
    for at, one in enumerate(found):
        look = Look(COLORS[at % len(COLORS)], DASHES[at // len(COLORS) % len(DASHES)])
        members = sorted(one.groups, key=lambda group: group.settings[key])
        xs = [group.settings[key] for group in members]
        best, final = (
            [group.over(of) for group in members]
            for of in (lambda run: run.best, lambda run: run.final)
        )
        mean, std = (100 * np.array(part) for part in zip(*final, strict=True))
        axes.errorbar(
            xs, mean, np.nan_to_num(std), color=look.color, marker="o", markersize=4, capsize=2
        )
        axes.plot(
            xs,
            [100 * stat.mean for stat in best],
            ":",
            color=look.color,
            marker="o",
            markersize=4,
            fillstyle="none",
        )
        ends.append((xs[-1], mean[-1], one.label or "final", look))
        if not one.label:
            ends.append((xs[-1], 100 * best[-1].mean, "best round", look))
    values = sorted({group.settings[key] for one in found for group in one.groups})
    if values[0] > 0 and values[-1] > 20 * values[0]:
        axes.set_xscale("log")
    if len(values) < 9:
        axes.set_xticks(values, map(shown, values))
        axes.minorticks_off()
    axes.set(xlabel=name, ylabel="accuracy / %")
    label_ends(axes, ends, height - 0.7)
    said = (
        f"Mean accuracy over clients and seeds against {key}, all else equal: filled marks with ± one sample "
        "standard deviation over seeds in the last evaluated round, open marks in the best round, which is chosen "
        "on test data."
    )
    return Drawn(f"sweep-{name}", f"Sweep over {name}", said, drawn)


def _grid(
    name: str, one: Series, pair: tuple[str, str], sides: tuple[list, list], keys: Sequence[str]
) -> Drawn:
    xs, ys = sides
    at = {
        tuple(group.settings[axis] for axis in pair): 100 * group.over(lambda run: run.best).mean
        for group in one.groups
    }
    values = np.array([[at.get((x, y), np.nan) for x in xs] for y in ys])
    drawn = figure(min(WIDTH, 2.4 + 0.62 * len(xs)), 1.2 + 0.45 * len(ys))
    axes = drawn.add_subplot()
    picture = axes.imshow(values, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(xs)), map(shown, xs))
    axes.set_yticks(range(len(ys)), map(shown, ys))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    x, y = (short(axis, keys) for axis in pair)
    axes.set(xlabel=x, ylabel=y, title=one.label)
    drawn.colorbar(picture, label="best accuracy / %").outline.set_visible(False)
    said = f"Best accuracy of any round, mean over clients and seeds, for {pair[0]} (across) and {pair[1]} (up), "
    said += "all else equal."
    return Drawn(name, f"Grid of {x} and {y}", said, drawn)


def _numeric(groups: Sequence[Group], key: str) -> bool:
    """Whether a setting is a number wherever it is set, with several values; runs of different
    length are no sweep.
    """
    if key == "rounds":
        return False
    values = [group.settings[key] for group in groups if group.settings.get(key) is not None]
    return len(set(map(repr, values))) > 1 and all(map(number, values))


def _label(group: Group, apart: Sequence[str], keys: Sequence[str]) -> str:
    """What sets a series apart, with the method's name alone."""

    def told(k):
        return (
            shown(group.settings[k])
            if k.endswith((".name", ".kind"))
            else f"{short(k, keys)} {shown(group.settings[k])}"
        )

    return ", ".join(told(k) for k in apart if group.settings.get(k) is not None)
