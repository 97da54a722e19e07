"""Show which data each client holds, as a text table and as a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.extras import extra_imports
from ..data.partition import Split
from ..store.files import replace_file
from .report import align_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..core.losses import Targets

_MAX_CLASSES, _MAX_CLIENTS = 20, 40  # largest numbers that the table shows one by one
_MAX_NAME_LENGTH = 24  # longest shown part of a class name, characters
_CELL_INCHES = 0.22  # inches between clients and between classes, unless the plot is at its limits
_WIDTH_LIMITS, _HEIGHT_LIMITS = (4.0, 16.0), (3.0, 12.0)  # limits of the plot, inches


def table(split: Split, names: Sequence[str] = (), targets: "Targets" = "classes") -> str:
    """Return a table with one row per client, for the first 40 clients.

    A row has the client's training samples of each class, all its training samples, and its test
    samples. With more than 20 classes it has instead the number of classes that the client holds,
    its largest class, and the share of that class. Below the rows are a line about all clients and
    a line with the first 20 ``names`` of the classes, or of the values of other ``targets``. For
    these a row has no classes.
    """
    clients, classes = split.train_counts.shape
    title, header = "training samples of each class", [str(label) for label in range(classes)]
    cells: Callable[[np.ndarray], Sequence[str]] = _class_cells
    if classes > _MAX_CLASSES:
        title, header, cells = (
            "classes held, and the largest",
            ["classes", "largest", "share"],
            _concentration_cells,
        )
    if targets != "classes":
        title, header, cells = "training and test samples", [], _no_cells
    rows = [("client", *header, "train", "test")]
    for client, counts in enumerate(split.train_counts[:_MAX_CLIENTS]):
        rows.append((str(client), *cells(counts), str(counts.sum()), str(len(split.test[client]))))
    omitted = [f"... and {clients - _MAX_CLIENTS} more clients"] if clients > _MAX_CLIENTS else []
    footer = [
        _summary(split, targets),
        *([f"{targets}: {', '.join(_numbered_names(names))}"] if names else []),
    ]
    heading = f"{title}; samples in all" if header else title
    return "\n".join([heading, align_columns(rows), *omitted, *footer])


def save_figure(split: Split, path: Path, names: Sequence[str] = ()) -> None:
    """Write ``figure(split, names)`` as a PNG. Raises ValueError if it cannot be written."""
    fig = figure(split, names)
    try:
        with replace_file(path) as file:
            fig.savefig(file, format="png", dpi=150)
    except OSError as error:
        why = f"picture = {path}: cannot be written: {error.strerror}"
        raise ValueError(f"{why}; choose another with --picture") from error


def figure(split: Split, names: Sequence[str] = ()) -> "Figure":
    """Return a figure like Figure 5 of Wu et al. (FedLoRA, see ``algorithms/fedlora.py``).

    The axes are swapped: x is the client, y is the class. The area of a dot is the number of
    training samples. Up to 20 classes are labelled with their ``names``. Raises ValueError if
    matplotlib is missing.
    """
    with extra_imports("matplotlib", "analysis", "the picture"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    counts = split.train_counts
    # [2] width, height in inches
    plot_size = np.clip(
        _CELL_INCHES * np.array(counts.shape), *np.transpose([_WIDTH_LIMITS, _HEIGHT_LIMITS])
    )
    cell = 72**2 * plot_size.prod() / counts.size  # points squared between four grid points
    max_count = counts.max()
    area = min(1.4 * cell, 20.0**2) / max_count  # of one sample
    client, label = np.nonzero(counts)
    dot_style: dict[str, Any] = {"color": "tab:red", "alpha": 0.75, "linewidths": 0}
    fig = Figure(figsize=plot_size + (2.0, 1.0), layout="constrained")
    axes = fig.add_subplot()
    axes.scatter(client, label, area * counts[client, label], **dot_style)
    for n in sorted({max_count // 4, max_count // 2, max_count} - {0}):
        axes.scatter([], [], area * n, label=str(n), **dot_style)
    axes.set(xlabel="client", ylabel="class", title="Training samples per client and class")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(25, integer=True))
    axes.set_xlim(-0.75, counts.shape[0] - 0.25)
    axes.set_ylim(-0.75, counts.shape[1] - 0.25)
    if 0 < len(names) <= _MAX_CLASSES:
        axes.set_yticks(
            range(len(names)), [name.replace("$", r"\$") for name in _numbered_names(names)]
        )
    axes.legend(
        title="samples",
        frameon=False,
        labelspacing=0.9,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return fig


def _numbered_names(names: Sequence[str]) -> list[str]:
    """Return the first 20 names with the numbers of their classes, each cut to a short length."""
    lines = [" ".join(name.split()) for name in names[:_MAX_CLASSES]]
    clean = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    short = [
        name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"
        for name in clean
    ]
    numbered = [f"{number} {name}" for number, name in enumerate(short)]
    return [*numbered, "..."] if len(names) > _MAX_CLASSES else numbered


def _no_cells(counts: np.ndarray) -> tuple[str, ...]:
    """Return the cells of one client if the targets are no classes."""
    return ()


def _class_cells(counts: np.ndarray) -> list[str]:
    """Return the cells of one client if there are few classes."""
    return [str(n) if n else "·" for n in counts]


def _concentration_cells(counts: np.ndarray) -> tuple[str, str, str]:
    """Return the cells of one client if there are many classes.

    They are the number of classes that it holds, its largest class, and the share of that class.
    """
    return str(np.count_nonzero(counts)), str(counts.argmax()), f"{counts.max() / counts.sum():.0%}"


def _summary(split: Split, targets: "Targets") -> str:
    """Return a line about all clients."""
    clients, classes = split.train_counts.shape

    def format_range(numbers):
        return " to ".join(str(n) for n in sorted({min(numbers), max(numbers)}))

    sides = [
        f"{sum(sizes):,} {name} samples ({format_range(sizes)} per client)"
        for name, sizes in (
            ("training", [*map(len, split.train)]),
            ("test", [*map(len, split.test)]),
        )
    ]
    if targets != "classes":
        return f"{clients} clients, the targets are {targets}: {', '.join(sides)}"
    classes_held = np.count_nonzero(split.train_counts, axis=1)
    return (
        f"{clients} clients, {classes} classes: {', '.join(sides)}, {format_range(classes_held)} "
        "classes per client"
    )
