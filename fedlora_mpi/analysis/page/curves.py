"""Draw metrics over the rounds, and accuracy over bytes and FLOPs."""

from collections.abc import Callable, Sequence

import numpy as np

from ..groups import Group
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
    set_round_axis,
    wrap_label,
)

Looks = dict[str, Look]
DIAGNOSIS = {
    "effective_clients": (
        "effective clients",
        "1 / Σ p², how many clients of equal weight the mean is worth",
    ),
    "lora_truncation": (
        "truncation",
        "squared distance of what clients get from the server's update, mean",
    ),
    "lora_bias": (
        "bias",
        "distance of the server's next update from the exact mean of the trained ones",
    ),
    "lora_update_bias": ("update bias", "the same distance, of what has changed in the round"),
}
_MAX_POINTS = 150  # largest number of points of a curve in a small panel
_BAND_NOTE = "the band is ± one sample standard deviation over the seeds, where there are several"


def learning_curves(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the mean accuracy over the rounds."""
    caption = (
        "Test accuracy of each client's own model on its own test data, mean over clients and "
        f"seeds, after every evaluated round; {_BAND_NOTE}."
    )
    return _line_figure(
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
            f"have one and over seeds; {_BAND_NOTE}."
        )

        def curve(group, name=name):
            return group.curves(name)

        title = f"Learning curves: {label}"
        figures.append(
            _line_figure(f"learning-{name}", title, caption, groups, looks, curve, label)
        )
    return [drawn for drawn in figures if drawn]


def loss_curves(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the training loss over the rounds."""
    caption = (
        "Training loss, mean over the local steps of the round's clients and over seeds; "
        f"{_BAND_NOTE}."
    )
    return _line_figure(
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
        f"distance (L2) of what they send from its mean, mean over seeds; {_BAND_NOTE}. What "
        "shares nothing has no curve."
    )
    drifting = [g for g in groups if g.curves("drift")[1].any()]
    return _line_figure(
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
        "The same over the clients, of all seeds together: the line is their mean, the dark band "
        "holds the middle half of them, the pale band all."
    ) + caption_note(looks, "are left out")
    return PageFigure("spread", "Spread over clients", caption, fig)


def diagnosis_curves(groups: Sequence[Group], looks: Looks) -> list[PageFigure]:
    """Draw each column that ``diagnose: true`` has logged, in a figure of its own."""
    figures = []
    for name, (title, explanation) in DIAGNOSIS.items():
        caption = (
            f"{explanation[0].upper()}{explanation[1:]}; mean over seeds. "
            f"{_BAND_NOTE[0].upper()}{_BAND_NOTE[1:]}."
        )

        def curve(group, name=name):
            return group.curves(name)

        figures.append(
            _line_figure(name, f"LoRA diagnosis: {title}", caption, groups, looks, curve, title)
        )
    return [drawn for drawn in figures if drawn]


def accuracy_by_bytes(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the accuracy over the bytes sent so far."""

    def traffic(run):
        return run.column("bytes_up") + run.column("bytes_down")

    caption = (
        "Mean accuracy against all bytes sent up and down so far, all clients together, as "
        "float32 in a real federation; mean over seeds. What sends nothing has no curve."
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
        "over seeds."
    )

    def compute(run):
        return run.column("flops").astype(float)

    label = "local training of all clients so far"
    return _cost_figure(
        "flops", "Accuracy against computation", caption, groups, looks, compute, label, "FLOP"
    )


def seconds_by_stage(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the mean seconds of a round by stage, with a bar for each group."""
    names = list(
        dict.fromkeys(
            n for g in groups for run in g.runs for n in run.rounds if n.startswith("seconds_")
        )
    )
    if not names:
        return None
    groups = named_groups(groups, looks)
    texts = [wrap_label(group.label, 44) for group in groups]
    fig = new_figure(
        WIDTH, 0.9 + (0.12 + 0.15 * max(text.count("\n") + 1 for text in texts)) * len(groups)
    )
    axes = fig.add_subplot()
    shades, left = ("#0072B2", "#56B4E9", "#BBBBBB", "#E69F00", "#777777"), np.zeros(len(groups))
    stage_seconds = np.array(
        [
            [group.seed_stat(lambda run, n=n: run.column(n).mean()).mean for n in names]
            for group in groups
        ]
    )
    stage_seconds = np.nan_to_num(stage_seconds)
    rows = np.arange(len(groups))
    for index, name in enumerate(names):
        color = shades[index % len(shades)]
        axes.barh(
            rows,
            stage_seconds[:, index],
            left=left,
            height=0.66,
            color=color,
            label=name.removeprefix("seconds_"),
        )
        left = left + stage_seconds[:, index]
    for row, total in enumerate(left):
        axes.annotate(
            f"{total:.3g} s",
            (total, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.set_yticks(rows, texts)
    axes.invert_yaxis()
    axes.set(xlabel="seconds per round", xlim=(0, 1.1 * left.max() or 1))
    axes.tick_params(axis="y", length=0)
    axes.legend(
        frameon=False, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0
    )
    caption = (
        "Mean seconds of a round by stage, mean over seeds, as rank 0 measures them: under mpirun "
        "it waits for the workers, and this waiting counts as exchange. Runs on different or busy "
        "machines are not comparable."
    ) + caption_note(looks, "are in the table of costs")
    return PageFigure("seconds", "Where the seconds go", caption, fig)


def _line_figure(
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
        look, mean = looks[group.label], values.mean(0)
        if not look.is_named:
            axes.plot(
                rounds, mean, marker=_lone_marker(rounds), color=look.color, linewidth=0.6, zorder=1
            )
            continue
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(
                rounds, mean - std, mean + std, color=look.color, alpha=0.15, linewidth=0
            )
        axes.plot(
            rounds, mean, marker=_lone_marker(rounds), color=look.color, linestyle=look.linestyle
        )
        ends.append((rounds[-1], mean[-1], group.label, look))
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
            curves.append((group, cost, 100 * accuracy.mean(0)))
    if not curves:
        return None
    height = figure_height([group.label for group, *_ in curves if looks[group.label].is_named])
    fig = new_figure(WIDTH, height)
    axes, ends = fig.add_subplot(), []
    prefix, size = _unit_prefix(max(cost[-1] for _, cost, _ in curves))
    for group, cost, accuracy in curves:
        look, cost = looks[group.label], cost / size
        if not look.is_named:
            axes.plot(
                cost, accuracy, marker=_lone_marker(cost), color=look.color, linewidth=0.6, zorder=1
            )
            continue
        axes.plot(
            cost, accuracy, marker=_lone_marker(cost), color=look.color, linestyle=look.linestyle
        )
        ends.append((cost[-1], accuracy[-1], group.label, look))
    last = [cost[-1] / size for _, cost, _ in curves]
    if max(last) > 10 * min(last):
        axes.set_xscale("log")
        caption += " The axis is logarithmic."
    else:
        axes.set_xlim(0, None)
    axes.set(xlabel=f"{label} / {prefix}{unit}", ylabel="accuracy / %")
    label_ends(axes, ends, height - 0.7)
    return PageFigure(name, title, caption + caption_note(looks, "are grey"), fig)


def _unit_prefix(number: float) -> tuple[str, float]:
    """Return the largest unit prefix that is not above ``number``, and its size."""
    sizes = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    return max(
        ((name, size) for name, size in sizes.items() if size <= max(1.0, number)),
        key=lambda pair: pair[1],
    )


def _lone_marker(x: np.ndarray) -> str:
    """Return the marker of a curve: a dot if it has only one point, else none."""
    return "o" if len(x) == 1 else ""
