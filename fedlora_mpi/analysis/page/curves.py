"""Draw metrics over the rounds, and accuracy over bytes and FLOPs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...core.units import unit_prefix
from ..groups import Group, count_clients, count_seeds
from ..scores import score_names
from .crowd import caption_note, named_groups
from .style import (
    WIDTH,
    Look,
    PageFigure,
    figure_height,
    label_ends,
    new_figure,
    panels,
    set_log_axis,
    set_round_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = dict[str, Look]
# {column: (title, what it is, its unit)}
DIAGNOSIS = {
    "effective_clients": (
        "effective clients",
        "1 / Σ p², how many clients of equal weight the mean is worth",
        "",
    ),
    "lora_truncation": (
        "truncation",
        "squared distance of what clients get from the server's update, mean",
        " (squared Frobenius norm)",
    ),
    "lora_bias": (
        "bias",
        "distance of the server's next update from the exact mean of the trained ones",
        " (Frobenius norm)",
    ),
    "lora_update_bias": (
        "update bias",
        "the same distance, of what has changed in the round",
        " (Frobenius norm)",
    ),
}
_MAX_POINTS = 150  # largest number of points of a curve in a small panel
BAND_NOTE = "the band is ± one sample standard deviation over seeds, where there are several"


def learning_curves(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the mean accuracy over the rounds."""
    caption = (
        "Test accuracy of each client's own model on its own test data, mean over "
        f"{count_clients(groups)} and {count_seeds(groups)}, after every evaluated round; "
        f"{BAND_NOTE}."
    )
    return line_figure(
        "learning",
        "Learning curves",
        caption,
        groups,
        looks,
        lambda g: g.curves("accuracy"),
        "accuracy / %",
        100,
    )


def score_curves(groups: Sequence[Group], looks: Looks) -> list[PageFigure]:
    """Draw the test loss of runs without classes and each of ``evaluate.metrics``."""
    runs = [run for group in groups for run in group.runs]
    names = dict.fromkeys(name for run in runs for name in score_names(run.config, run.rounds))
    figures = []
    for name in names:
        label = "test loss" if name == "loss" else name
        caption = (
            f"{label} of each client's own model on its own test data, mean over the clients that "
            f"have one and over seeds; {BAND_NOTE}."
        )

        def curve(group, name=name):
            return group.curves(name)

        title = f"Learning curves: {label}"
        figures.append(line_figure(f"learning-{name}", title, caption, groups, looks, curve, label))
    return [drawn for drawn in figures if drawn]


def loss_curves(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the training loss over the rounds."""
    caption = (
        "Training loss, mean over the local steps of the round's clients and over "
        f"{count_seeds(groups)}; {BAND_NOTE}."
    )
    return line_figure(
        "loss",
        "Training loss",
        caption,
        groups,
        looks,
        lambda g: g.curves("train_loss"),
        "training loss",
    )


def drift_curves(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the drift of the shared parameters over the rounds, as in FedLoRA's Figure 6."""
    caption = (
        "How far the clients train the shared parameters apart in a round: root mean square "
        f"distance (L2) of what they send from its mean, mean over {count_seeds(groups)}; "
        f"{BAND_NOTE}. A method that shares nothing has no curve."
    )
    drifting = [g for g in groups if g.curves("drift")[1].any()]
    return line_figure(
        "drift",
        "Drift of the shared part",
        caption,
        drifting,
        looks,
        lambda g: g.curves("drift"),
        "drift (L2)",
    )


def client_spread(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the spread of the clients' accuracies over the rounds, with a panel for each group."""
    plotted = [g for g in named_groups(groups, looks) if g.curves("accuracy")[1].size]
    if not plotted:
        return None
    titles = [(group.label, looks[group.label]) for group in plotted]
    fig, all_axes = panels(titles, (2.15, 1.5), "round", "accuracy / %")
    for axes, group in zip(all_axes, plotted, strict=True):
        rounds, accuracies = group.client_curves("accuracy")
        plotted_rows = np.unique(np.linspace(0, len(rounds) - 1, _MAX_POINTS).round().astype(int))
        # [T, seeds N]
        values = 100 * np.concatenate(accuracies, axis=1)[plotted_rows].astype(float)
        low, first, third, high = np.nanquantile(values, (0.0, 0.25, 0.75, 1.0), axis=1)
        look, rounds = looks[group.label], rounds[plotted_rows]
        axes.fill_between(rounds, low, high, color=look.color, alpha=0.15, linewidth=0)
        axes.fill_between(rounds, first, third, color=look.color, alpha=0.35, linewidth=0)
        axes.plot(
            rounds,
            100 * group.curves("accuracy")[1].mean(0)[plotted_rows],
            marker=_lone_marker(rounds),
            color=look.color,
        )
    set_round_axis(all_axes[0], max(group.curves("accuracy")[0][-1] for group in plotted))
    caption = (
        f"The same over the {count_clients(plotted)}, of {count_seeds(plotted)} together: the line "
        "is their mean, the dark band holds the middle half of them, the pale band all."
    ) + caption_note(looks, "are left out")
    return PageFigure("spread", "Spread over clients", caption, fig)


def diagnosis_curves(groups: Sequence[Group], looks: Looks) -> list[PageFigure]:
    """Draw each column that ``diagnose: true`` has logged, in a figure of its own."""
    figures = []
    for name, (title, explanation, unit) in DIAGNOSIS.items():
        caption = (
            f"{explanation[0].upper()}{explanation[1:]}; mean over {count_seeds(groups)}. "
            f"{BAND_NOTE[0].upper()}{BAND_NOTE[1:]}."
        )

        def curve(group, name=name):
            return group.curves(name)

        figures.append(
            line_figure(
                name, f"LoRA diagnosis: {title}", caption, groups, looks, curve, title + unit
            )
        )
    return [drawn for drawn in figures if drawn]


def accuracy_by_bytes(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the accuracy over the bytes sent so far."""

    def traffic(run):
        return run.column("bytes_up") + run.column("bytes_down")

    caption = (
        "Mean accuracy against all bytes sent up and down so far, all clients together, as float32 "
        f"in a real federation; mean over {count_clients(groups)} and {count_seeds(groups)}; "
        f"{BAND_NOTE}. A method that sends nothing has no curve."
    )
    return _cost_figure(
        "bytes",
        "Accuracy against bytes",
        caption,
        groups,
        looks,
        traffic,
        "sent by all clients so far",
        "B",
    )


def accuracy_by_flops(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the accuracy over the FLOPs of local training so far."""
    caption = (
        "Mean accuracy against the floating-point operations of all local training so far; mean "
        f"over {count_clients(groups)} and {count_seeds(groups)}; {BAND_NOTE}."
    )

    def compute(run):
        return run.column("flops").astype(float)

    label = "local training of all clients so far"
    return _cost_figure(
        "flops", "Accuracy against computation", caption, groups, looks, compute, label, "FLOP"
    )


def line_figure(
    name: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    looks: Looks,
    curve: Callable[[Group], tuple[np.ndarray, np.ndarray]],
    label: str,
    unit: float = 1,
) -> PageFigure | None:
    """Draw a line for each group, with a band over its seeds; None if there is no curve."""
    curves = [(group, *curve(group)) for group in groups]
    curves = [(group, rounds, unit * values) for group, rounds, values in curves if values.size]
    if not curves:
        return None
    height = figure_height([group.label for group, *_ in curves if looks[group.label].is_named])
    fig = new_figure(WIDTH, height)
    axes, ends = fig.add_subplot(), []
    for group, rounds, values in curves:
        ends += _draw_line(axes, rounds, values, group.label, looks[group.label])
    axes.set(xlabel="round", ylabel=label)
    set_round_axis(axes, max(rounds[-1] for _, rounds, _ in curves))
    label_ends(axes, ends, height - 0.7)
    return PageFigure(name, title, caption + caption_note(looks, "are grey"), fig)


def _cost_figure(
    name: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    looks: Looks,
    cost_of: Callable,
    label: str,
    unit: str,
) -> PageFigure | None:
    """Draw the accuracy over the cumulative sum of ``cost_of(run)`` [T]; None without a curve."""
    curves = []
    for group in groups:
        rounds, accuracy = group.curves("accuracy")
        if not len(rounds):
            continue
        spent = [
            np.cumsum(cost_of(run))[np.isin(run.rounds["round"], rounds)] for run in group.runs
        ]
        cost = np.mean(spent, axis=0)
        if not np.isnan(cost).any() and cost[-1] > 0:
            curves.append((group, cost, 100 * accuracy))
    if not curves:
        return None
    height = figure_height([group.label for group, *_ in curves if looks[group.label].is_named])
    fig = new_figure(WIDTH, height)
    axes, ends = fig.add_subplot(), []
    prefix, size = unit_prefix(max(cost[-1] for _, cost, _ in curves))
    for group, cost, accuracy in curves:
        ends += _draw_line(axes, cost / size, accuracy, group.label, looks[group.label])
    last = [cost[-1] / size for _, cost, _ in curves]
    if max(last) > 10 * min(last):
        set_log_axis(axes)
        caption += " The axis is logarithmic."
    else:
        axes.set_xlim(0, None)
    axes.set(xlabel=f"{label} / {prefix}{unit}", ylabel="accuracy / %")
    label_ends(axes, ends, height - 0.7)
    return PageFigure(name, title, caption + caption_note(looks, "are grey"), fig)


def _draw_line(
    axes: "Axes", x: np.ndarray, values: np.ndarray, label: str, look: Look
) -> list[tuple[float, float, str, Look]]:
    """Draw the mean of ``values`` [seeds, T] over ``x`` [T], with a band of ± one deviation.

    Returns the end of the line for ``label_ends``; none if the look has no name.
    """
    mean, marker = values.mean(0), _lone_marker(x)
    if not look.is_named:
        axes.plot(x, mean, marker=marker, color=look.color, linewidth=0.6, zorder=1)
        return []
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=look.color, alpha=0.15, linewidth=0)
    axes.plot(x, mean, marker=marker, color=look.color, linestyle=look.linestyle)
    return [(x[-1], mean[-1], label, look)]


def _lone_marker(x: np.ndarray) -> str:
    """Return the marker of a curve: a dot if it has only one point, else none."""
    return "o" if len(x) == 1 else ""
