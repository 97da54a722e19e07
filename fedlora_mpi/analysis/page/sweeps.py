"""Draw accuracy against numeric settings.

A setting that differs alone is the axis of a sweep. Two settings that differ on a grid are a heat
map.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..groups import (
    Group,
    count_clients,
    count_seeds,
    format_setting,
    is_number,
    short_key,
)
from ..method_names import paper_name
from .style import (
    WIDTH,
    Look,
    PageFigure,
    distinct_looks,
    figure_height,
    label_ends,
    new_figure,
    set_log_axis,
)

_MIN_GRID_SHARE = 0.75  # smallest share of a grid's cells that must have a group


class Series(NamedTuple):
    """Groups that differ only in the settings on the axes.

    label: the settings that tell this series from the others.
    """

    label: str
    groups: list[Group]


def find_series(groups: Sequence[Group], keys: Sequence[str], axes: Sequence[str]) -> list[Series]:
    """Return the series of groups that differ only in the settings ``axes``.

    Their values of ``axes`` are numbers. A series has at least two groups.
    """
    members_of: dict[str, list[Group]] = {}
    other_keys = [key for key in keys if key not in axes]
    for group in groups:
        if all(is_number(group.settings.get(axis)) for axis in axes):
            members_of.setdefault(repr([group.settings.get(key) for key in other_keys]), []).append(
                group
            )
    members_of = {name: members for name, members in members_of.items() if len(members) > 1}
    differing = [
        k
        for k in other_keys
        if len({repr(members[0].settings.get(k)) for members in members_of.values()}) > 1
    ]
    return [
        Series(_series_label(members[0], differing, keys), members)
        for members in members_of.values()
    ]


def grid_figures(groups: Sequence[Group], keys: Sequence[str]) -> tuple[list[PageFigure], set[str]]:
    """Draw a heat map like FedLoRA's Table 2 for every two settings on a grid.

    Returns the figures and the keys of the settings that they show.
    """
    figures: list[PageFigure] = []
    used_keys: set[str] = set()
    for pair in combinations([key for key in keys if _is_numeric(groups, key)], 2):
        for grid_series in find_series(groups, keys, pair):
            xs, ys = (
                sorted({group.settings[axis] for group in grid_series.groups}) for axis in pair
            )
            if min(len(xs), len(ys)) > 1 and len(grid_series.groups) >= _MIN_GRID_SHARE * len(
                xs
            ) * len(ys):
                number_ = f"-{len(figures) + 1}" if figures else ""
                figures.append(_grid_figure(f"grid{number_}", grid_series, pair, (xs, ys), keys))
                used_keys |= set(pair)
    return figures, used_keys


def sweep_figures(
    groups: Sequence[Group], keys: Sequence[str], excluded: set[str], looks: dict[str, Look]
) -> list[PageFigure]:
    """Draw final and best accuracy over each numeric setting not in ``excluded``.

    The figures are like FedLoRA's Figure 4. A curve has the look of its first group.
    """
    figures = []
    for key in (key for key in keys if key not in excluded and _is_numeric(groups, key)):
        if key_series := find_series(groups, keys, [key]):
            figures.append(_sweep_figure(key, key_series, keys, looks))
    names = Counter(sweep_figure.name for sweep_figure in figures)
    return [
        each._replace(name=f"{each.name}-{n}") if names[each.name] > 1 else each
        for n, each in enumerate(figures, 1)
    ]


def _sweep_figure(
    key: str, key_series: Sequence[Series], keys: Sequence[str], looks: dict[str, Look]
) -> PageFigure:
    height = figure_height([line_series.label for line_series in key_series])
    fig = new_figure(WIDTH, height)
    axes, ends, name = fig.add_subplot(), [], short_key(key, keys)
    series_looks = [looks[one.groups[0].label] for one in key_series]
    if not all(look.is_named for look in series_looks):
        series_looks = distinct_looks(len(key_series))
    for one, look in zip(key_series, series_looks, strict=True):
        members = sorted(one.groups, key=lambda group: group.settings[key])
        xs = [group.settings[key] for group in members]
        best, final = (
            [group.seed_stat(metric) for group in members]
            for metric in (lambda run: run.best, lambda run: run.final)
        )
        mean, std = (100 * np.array(part) for part in zip(*final, strict=True))
        axes.errorbar(
            xs, mean, np.nan_to_num(std), color=look.color, linestyle=look.linestyle,
            marker="o", markersize=4, capsize=2,
        )  # fmt: skip
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
    swept = [group for one in key_series for group in one.groups]
    values = sorted({group.settings[key] for group in swept})
    if values[0] > 0 and values[-1] > 20 * values[0]:
        set_log_axis(axes)
    if len(values) < 9:
        axes.set_xticks(values, map(format_setting, values))
        axes.minorticks_off()
    axes.set(xlabel=name, ylabel="accuracy / %")
    label_ends(axes, ends, height - 0.7)
    caption = (
        f"Mean accuracy over {count_clients(swept)} and {count_seeds(swept)} against {key}, all "
        "else equal: filled marks with ± one sample standard deviation over seeds in the last "
        "evaluated round, open marks in the best round, which is chosen on test data."
    )
    return PageFigure(f"sweep-{name}", f"Sweep over {name}", caption, fig)


def _grid_figure(
    name: str,
    grid_series: Series,
    pair: tuple[str, str],
    sides: tuple[list, list],
    keys: Sequence[str],
) -> PageFigure:
    xs, ys = sides
    accuracy_at = {
        tuple(group.settings[axis] for axis in pair): 100
        * group.seed_stat(lambda run: run.best).mean
        for group in grid_series.groups
    }
    values = np.array([[accuracy_at.get((x, y), np.nan) for x in xs] for y in ys])
    fig = new_figure(min(WIDTH, 2.4 + 0.62 * len(xs)), 1.2 + 0.45 * len(ys))
    axes = fig.add_subplot()
    image = axes.imshow(values, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(xs)), map(format_setting, xs))
    axes.set_yticks(range(len(ys)), map(format_setting, ys))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    x, y = (short_key(axis, keys) for axis in pair)
    axes.set(xlabel=x, ylabel=y, title=grid_series.label)
    fig.colorbar(image, label="best accuracy / %").outline.set_visible(False)
    caption = (
        f"Best accuracy of any round, mean over {count_clients(grid_series.groups)} and "
        f"{count_seeds(grid_series.groups)}, for {pair[0]} (across) and "
        f"{pair[1]} (up), "
    )
    caption += "all else equal."
    return PageFigure(name, f"Grid of {x} and {y}", caption, fig)


def _is_numeric(groups: Sequence[Group], key: str) -> bool:
    """Return whether a setting has several values, all numbers.

    The number of rounds is excluded: runs of different length are not a sweep.
    """
    if key == "rounds":
        return False
    values = [group.settings[key] for group in groups if group.settings.get(key) is not None]
    return len(set(map(repr, values))) > 1 and all(map(is_number, values))


def _series_label(group: Group, differing: Sequence[str], keys: Sequence[str]) -> str:
    """Return the label of a series; names and kinds are shown without their key."""

    def describe(k):
        if k == "algorithm.name":
            return paper_name(group.settings[k])
        return (
            format_setting(group.settings[k])
            if k.endswith((".name", ".kind"))
            else f"{short_key(k, keys)} {format_setting(group.settings[k])}"
        )

    return ", ".join(describe(k) for k in differing if group.settings.get(k) is not None)
