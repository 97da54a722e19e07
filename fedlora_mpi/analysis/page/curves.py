"""Figures over the rounds, and over what was spent."""

from collections.abc import Callable, Sequence

import numpy as np

from ..groups import Group
from .crowd import named, note
from .style import (
    WIDTH,
    Drawn,
    Look,
    figure,
    label_ends,
    panels,
    tall_enough,
    whole_rounds,
    wrapped,
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
_POINTS = 150  # of a curve in a small panel
_OVER_SEEDS = "the band is ± one sample standard deviation over the seeds, where there are several"


def learning(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """Mean accuracy over the rounds."""
    said = (
        "Test accuracy of each client's own model on its own test data, mean over clients and seeds, after every "
        f"evaluated round; {_OVER_SEEDS}."
    )
    return _lines(
        "learning",
        "Learning curves",
        said,
        groups,
        looks,
        lambda g: g.curves("accuracy"),
        "accuracy / %",
        100,
    )


def loss(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """Training loss over the rounds."""
    said = f"Training loss, mean over the local steps of the round's clients and over seeds; {_OVER_SEEDS}."
    return _lines(
        "loss",
        "Training loss",
        said,
        groups,
        looks,
        lambda g: g.curves("train_loss"),
        "training loss",
    )


def drift(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """FedLoRA's Figure 6."""
    said = (
        "How far the clients train the shared parameters apart in a round: root mean square distance (L2) of what "
        f"they send from its mean, mean over seeds; {_OVER_SEEDS}. What shares nothing has no curve."
    )
    there = [g for g in groups if g.curves("drift")[1].any()]
    return _lines(
        "drift",
        "Drift of the shared part",
        said,
        there,
        looks,
        lambda g: g.curves("drift"),
        "drift (L2)",
    )


def spread(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """The accuracy of all clients over the rounds, a panel for each group."""
    there = [g for g in named(groups, looks) if g.curves("accuracy")[1].size]
    if not there:
        return None
    titles = [(group.label, looks[group.label]) for group in there]
    drawn, every = panels(titles, (2.15, 1.5), "round", "accuracy / %")
    for axes, group in zip(every, there, strict=True):
        rounds, found = group.of_clients("accuracy")
        shown = np.unique(np.linspace(0, len(rounds) - 1, _POINTS).round().astype(int))
        values = 100 * np.concatenate(found, axis=1)[shown].astype(float)  # [T, seeds N]
        low, first, third, high = np.nanquantile(values, (0.0, 0.25, 0.75, 1.0), axis=1)
        look, rounds = looks[group.label], rounds[shown]
        axes.fill_between(rounds, low, high, color=look.color, alpha=0.15, linewidth=0)
        axes.fill_between(rounds, first, third, color=look.color, alpha=0.35, linewidth=0)
        axes.plot(
            rounds,
            100 * group.curves("accuracy")[1].mean(0)[shown],
            marker=_mark(rounds),
            color=look.color,
        )
    whole_rounds(every[0], max(group.curves("accuracy")[0][-1] for group in there))
    said = (
        "The same over the clients, of all seeds together: the line is their mean, the dark band holds the middle "
        "half of them, the pale band all."
    ) + note(looks, "are left out")
    return Drawn("spread", "Spread over clients", said, drawn)


def diagnosis(groups: Sequence[Group], looks: Looks) -> list[Drawn]:
    """What ``diagnose: true`` has logged, a figure for each column."""
    found = []
    for name, (title, said) in DIAGNOSIS.items():
        caption = f"{said[0].upper()}{said[1:]}; mean over seeds. {_OVER_SEEDS[0].upper()}{_OVER_SEEDS[1:]}."

        def curve(group, name=name):
            return group.curves(name)

        found.append(_lines(name, f"LoRA diagnosis: {title}", caption, groups, looks, curve, title))
    return [drawn for drawn in found if drawn]


def against_bytes(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """Accuracy over what has been sent."""

    def traffic(run):
        return run.column("bytes_up") + run.column("bytes_down")

    said = (
        "Mean accuracy against all bytes sent up and down so far, all clients together, as float32 in a real "
        "federation; mean over seeds. What sends nothing has no curve."
    )
    return _cost(
        "bytes",
        "Accuracy against bytes",
        said,
        groups,
        looks,
        traffic,
        "sent by all clients so far",
        "B",
    )


def against_flops(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """Accuracy over what has been computed."""
    said = "Mean accuracy against the floating-point operations of all local training so far; mean over seeds."

    def compute(run):
        return run.column("flops").astype(float)

    label = "local training of all clients so far"
    return _cost(
        "flops", "Accuracy against computation", said, groups, looks, compute, label, "FLOP"
    )


def stages(groups: Sequence[Group], looks: Looks) -> Drawn | None:
    """Where the seconds go."""
    names = list(
        dict.fromkeys(
            n for g in groups for run in g.runs for n in run.rounds if n.startswith("seconds_")
        )
    )
    if not names:
        return None
    groups = named(groups, looks)
    texts = [wrapped(group.label, 44) for group in groups]
    drawn = figure(
        WIDTH, 0.9 + (0.12 + 0.15 * max(text.count("\n") + 1 for text in texts)) * len(groups)
    )
    axes = drawn.add_subplot()
    shades, left = ("#0072B2", "#56B4E9", "#BBBBBB", "#E69F00", "#777777"), np.zeros(len(groups))
    each = np.array(
        [
            [group.over(lambda run, n=n: run.column(n).mean()).mean for n in names]
            for group in groups
        ]
    )
    each = np.nan_to_num(each)
    rows = np.arange(len(groups))
    for at, name in enumerate(names):
        color = shades[at % len(shades)]
        axes.barh(
            rows,
            each[:, at],
            left=left,
            height=0.66,
            color=color,
            label=name.removeprefix("seconds_"),
        )
        left = left + each[:, at]
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
    said = (
        "Mean seconds of a round by stage, mean over seeds, as rank 0 measures them: under mpirun it waits for the "
        "workers, and this waiting counts as exchange. Runs on different or busy machines are not comparable."
    ) + note(looks, "are in the table of costs")
    return Drawn("seconds", "Where the seconds go", said, drawn)


def _lines(
    name: str,
    title: str,
    said: str,
    groups: Sequence[Group],
    looks: Looks,
    curve: Callable[[Group], tuple[np.ndarray, np.ndarray]],
    label: str,
    unit: float = 1,
) -> Drawn | None:
    """A line for each group, with a band over its seeds."""
    found = [(group, *curve(group)) for group in groups]
    found = [(group, rounds, unit * values) for group, rounds, values in found if values.size]
    if not found:
        return None
    height = tall_enough([group.label for group, *_ in found if looks[group.label].named])
    drawn = figure(WIDTH, height)
    axes, ends = drawn.add_subplot(), []
    for group, rounds, values in found:
        look, mean = looks[group.label], values.mean(0)
        if not look.named:
            axes.plot(rounds, mean, marker=_mark(rounds), color=look.color, linewidth=0.6, zorder=1)
            continue
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(
                rounds, mean - std, mean + std, color=look.color, alpha=0.15, linewidth=0
            )
        axes.plot(rounds, mean, marker=_mark(rounds), color=look.color, linestyle=look.dash)
        ends.append((rounds[-1], mean[-1], group.label, look))
    axes.set(xlabel="round", ylabel=label)
    whole_rounds(axes, max(rounds[-1] for _, rounds, _ in found))
    label_ends(axes, ends, height - 0.7)
    return Drawn(name, title, said + note(looks, "are grey"), drawn)


def _cost(
    name: str,
    title: str,
    said: str,
    groups: Sequence[Group],
    looks: Looks,
    of: Callable,
    label: str,
    unit: str,
) -> Drawn | None:
    """Accuracy over the sum so far of ``of(run)`` [T]."""
    found = []
    for group in groups:
        rounds, accuracy = group.curves("accuracy")
        if not len(rounds):
            continue
        spent = [np.cumsum(of(run))[np.isin(run.rounds["round"], rounds)] for run in group.runs]
        cost = np.mean(spent, axis=0)
        if not np.isnan(cost).any() and cost[-1] > 0:
            found.append((group, cost, 100 * accuracy.mean(0)))
    if not found:
        return None
    height = tall_enough([group.label for group, *_ in found if looks[group.label].named])
    drawn = figure(WIDTH, height)
    axes, ends = drawn.add_subplot(), []
    prefix, size = _prefix(max(cost[-1] for _, cost, _ in found))
    for group, cost, accuracy in found:
        look, cost = looks[group.label], cost / size
        if not look.named:
            axes.plot(cost, accuracy, marker=_mark(cost), color=look.color, linewidth=0.6, zorder=1)
            continue
        axes.plot(cost, accuracy, marker=_mark(cost), color=look.color, linestyle=look.dash)
        ends.append((cost[-1], accuracy[-1], group.label, look))
    last = [cost[-1] / size for _, cost, _ in found]
    if max(last) > 10 * min(last):
        axes.set_xscale("log")
        said += " The axis is logarithmic."
    else:
        axes.set_xlim(0, None)
    axes.set(xlabel=f"{label} / {prefix}{unit}", ylabel="accuracy / %")
    label_ends(axes, ends, height - 0.7)
    return Drawn(name, title, said + note(looks, "are grey"), drawn)


def _prefix(number: float) -> tuple[str, float]:
    """The prefix of a unit, and its size, with which a number is short."""
    sizes = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    return max(
        ((name, size) for name, size in sizes.items() if size <= max(1.0, number)),
        key=lambda pair: pair[1],
    )


def _mark(x: np.ndarray) -> str:
    """A lone point needs one."""
    return "o" if len(x) == 1 else ""
