"""Who holds which data: a table of text, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.partition import Split
from ..store.files import replacing
from .report import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLASSES, _CLIENTS = 20, 40  # up to so many the table shows each
_NAME = 24  # characters that are shown of the name of a class
_CELL = 0.22  # inches between clients and between classes, in a picture that is not at its limits
_WIDTH, _HEIGHT = (4.0, 16.0), (3.0, 12.0)  # limits of the plot, inches


def table(split: Split, names: Sequence[str] = ()) -> str:
    """One row a client: its training samples of each class (of many classes: how many it holds,
    which it holds most of, and that share), all of them, its test samples. The first 40 clients, a
    line about all, and one with the first 20 ``names`` of the classes.
    """
    clients, classes = split.train_counts.shape
    title, header, cells = "training samples of each class", map(str, range(classes)), _each_class
    if classes > _CLASSES:
        title, header, cells = (
            "classes held, and the largest",
            ["classes", "largest", "share"],
            _spread,
        )
    rows = [("client", *header, "train", "test")]
    for client, counts in enumerate(split.train_counts[:_CLIENTS]):
        rows.append((str(client), *cells(counts), str(counts.sum()), str(len(split.test[client]))))
    more = [f"... and {clients - _CLIENTS} more clients"] if clients > _CLIENTS else []
    last = [_summary(split), *([f"classes: {', '.join(_numbered(names))}"] if names else [])]
    return "\n".join([f"{title}; samples in all", aligned(rows), *more, *last])


def draw(split: Split, picture: Path, names: Sequence[str] = ()) -> None:
    """Write ``figure(split, names)`` as a PNG. Raises ValueError where it cannot be written."""
    drawn = figure(split, names)
    try:
        with replacing(picture) as file:
            drawn.savefig(file, format="png", dpi=150)
    except OSError as error:
        why = f"picture = {picture}: cannot be written: {error.strerror}"
        raise ValueError(f"{why}; choose another with --picture") from error


def figure(split: Split, names: Sequence[str] = ()) -> "Figure":
    """The dots of Wu et al. (FedLoRA, see ``algorithms/fedlora.py``), Figure 5, with the axes
    swapped: x client, y class, the area of a dot the number of training samples. Up to 20 classes
    bear their ``names``.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib: pip install 'fedlora-mpi[analysis]'"
        ) from error

    counts = split.train_counts
    sides = np.clip(_CELL * np.array(counts.shape), *np.transpose([_WIDTH, _HEIGHT]))  # inches
    cell = 72**2 * sides.prod() / counts.size  # points squared between four grid points
    top = counts.max()
    area = min(1.4 * cell, 20.0**2) / top  # of one sample
    client, label = np.nonzero(counts)
    red = {"color": "tab:red", "alpha": 0.75, "linewidths": 0}
    drawn = Figure(figsize=sides + (2.0, 1.0), layout="constrained")
    axes = drawn.add_subplot()
    axes.scatter(client, label, area * counts[client, label], **red)
    for n in sorted({top // 4, top // 2, top} - {0}):
        axes.scatter([], [], area * n, label=str(n), **red)
    axes.set(xlabel="client", ylabel="class", title="Training samples per client and class")
    for axis, n in zip((axes.xaxis, axes.yaxis), counts.shape, strict=True):
        axis.set_major_locator(MaxNLocator(25, integer=True))
        getattr(axes, f"set_{axis.axis_name}lim")(-0.75, n - 0.25)
    if 0 < len(names) <= _CLASSES:
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in _numbered(names)])
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(title="samples", frameon=False, labelspacing=0.9, **beside)
    return drawn


def _numbered(names: Sequence[str]) -> list[str]:
    """The first 20 names with the numbers of their classes, each short enough for a line."""
    lines = [" ".join(name.split()) for name in names[:_CLASSES]]
    clean = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    short = [name if len(name) <= _NAME else f"{name[: _NAME - 1]}…" for name in clean]
    numbered = [f"{number} {name}" for number, name in enumerate(short)]
    return [*numbered, "..."] if len(names) > _CLASSES else numbered


def _each_class(counts: np.ndarray) -> list[str]:
    """The cells of one client, few classes."""
    return [str(n) if n else "·" for n in counts]


def _spread(counts: np.ndarray) -> tuple[str, str, str]:
    """The cells of one client, many classes: how many it holds, the one it holds most of, its
    share.
    """
    return str(np.count_nonzero(counts)), str(counts.argmax()), f"{counts.max() / counts.sum():.0%}"


def _summary(split: Split) -> str:
    """All clients in one line."""
    clients, classes = split.train_counts.shape

    def each(numbers):
        return " to ".join(str(n) for n in sorted({min(numbers), max(numbers)}))

    sides = [
        f"{sum(sizes):,} {name} samples ({each(sizes)} per client)"
        for name, sizes in (
            ("training", [*map(len, split.train)]),
            ("test", [*map(len, split.test)]),
        )
    ]
    held = np.count_nonzero(split.train_counts, axis=1)
    return (
        f"{clients} clients, {classes} classes: {', '.join(sides)}, {each(held)} classes per client"
    )
