"""Define the look of all figures. matplotlib is imported only when a figure is made."""

import io
import os
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...core.extras import extra_imports

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which colour-blind readers can tell apart. Grey replaces their
# yellow, which is too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
DASHES: tuple[str | tuple, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
GREY = "#777777"
DPI = 150  # resolution of PNG files
WIDTH = 7.2  # width of a figure over the whole page, inches
RC_PARAMS = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    # inches; leaves room because tick labels may get one more digit during layout
    "figure.constrained_layout.w_pad": 0.12,
    "pdf.fonttype": 42,  # TrueType fonts, which publishers require
    "text.hinting": "none",  # so that text has the same width at any resolution
    "text.parse_math": False,  # so that a name with a $ is not read as a formula
    "svg.hashsalt": "fedlora_mpi",  # so that equal figures have equal bytes
}
_LINE_INCHES = 11.5 / 72  # height of a line of a label, inches
_LABEL_CHARS = 40  # characters per line of a label


class Look(NamedTuple):
    """The look of a group, the same in every figure."""

    color: str
    linestyle: str | tuple
    is_named: bool = True  # if not: one of many groups, drawn pale and without a label

    @property
    def ink(self) -> str:
        """The colour, dark enough for text on white."""
        parts = [int(self.color[start : start + 2], 16) for start in (1, 3, 5)]
        return "#" + "".join(f"{int(0.72 * part):02x}" for part in parts)


class PageFigure(NamedTuple):
    """A figure with its file name, heading and caption."""

    name: str
    title: str
    caption: str
    figure: "Figure"

    def render(self, kind: str) -> bytes:
        """Return the figure as ``png``, ``pdf`` or ``svg``; equal runs give equal bytes."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_pdf import FigureCanvasPdf
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        if self.figure.get_layout_engine():  # compute the layout once, not for each kind
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
        content = io.BytesIO()  # the canvases write it: savefig would draw everything twice
        self.figure.set_dpi(DPI)
        if kind == "png":
            FigureCanvasAgg(self.figure).print_png(content)
        elif kind == "pdf":
            FigureCanvasPdf(self.figure).print_pdf(content, metadata={"CreationDate": None})
        else:
            FigureCanvasSVG(self.figure).print_svg(content, metadata={"Date": None})
        return content.getvalue()


@contextmanager
def plot_style():
    """A context that replaces the user's settings of matplotlib by ours.

    Make and save figures within it. Raises ValueError without matplotlib.
    """
    with extra_imports("matplotlib", "analysis", "figures"):
        import matplotlib
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC_PARAMS)
        yield


def render_files(figures: Sequence[PageFigure]) -> list[dict[str, bytes]]:
    """Return {kind: bytes} of each figure, as PNG, PDF and SVG.

    Linux draws on all cores, in forked processes, which need not pickle the figures. Other systems
    draw on one core, because a fork is not safe there.
    """
    cores = min(len(os.sched_getaffinity(0)), len(figures)) if sys.platform == "linux" else 1
    if cores < 2:
        return [_render_figure(figure) for figure in figures]
    with ProcessPoolExecutor(
        cores, get_context("fork"), _start_worker, (figures, os.getpid())
    ) as pool:
        return list(pool.map(_render_index, range(len(figures))))


_worker_figures: list[PageFigure] = []  # filled only in a process that draws


def _start_worker(figures: Sequence[PageFigure], parent: int) -> None:
    """Prepare a process that draws.

    It inherits the figures. It exits when its parent has ended in any way.
    """

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker_figures.extend(figures)


def _render_index(index: int) -> dict[str, bytes]:
    return _render_figure(_worker_figures[index])


def _render_figure(figure: PageFigure) -> dict[str, bytes]:
    return {kind: figure.render(kind) for kind in ("png", "pdf", "svg")}


def distinct_looks(number: int) -> list[Look]:
    """Return ``number`` looks; the first 32 are all different."""
    return [
        Look(COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)])
        for index in range(number)
    ]


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(
    titles: Sequence[tuple[str, Look]],
    panel_size: tuple[float, float],
    x_label: str,
    y_label: str,
    bottom_space: float = 0,
) -> "tuple[Figure, list[Axes]]":
    """Return a figure with a plot under each title, and its plots.

    There are up to three plots in a row, with common axes. panel_size: (width, height) of a plot,
    inches. bottom_space: empty space below all plots, inches. Margins are constants, because
    computing them takes as long as drawing the figure.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    texts = [wrap_label(title, int(13 * panel_size[0])) for title, _ in titles]
    title_height = 0.1 + 0.17 * max(text.count("\n") + 1 for text in texts)  # inches
    left, bottom, between = 0.62, 0.55 + bottom_space, 0.22
    width = left + columns * panel_size[0] + (columns - 1) * between + 0.15
    height = bottom + rows * (panel_size[1] + title_height) + (rows - 1) * between
    fig = Figure(figsize=(width, height))
    grid = {
        "left": left / width,
        "right": 1 - 0.15 / width,
        "bottom": bottom / height,
        "top": 1 - title_height / height,
    }
    grid |= {"wspace": between / panel_size[0], "hspace": (between + title_height) / panel_size[1]}
    all_axes = fig.subplots(
        rows, columns, sharex=True, sharey=True, squeeze=False, gridspec_kw=grid
    ).ravel()
    for axes in all_axes[len(titles) :]:
        axes.remove()
    for axes in all_axes[max(0, len(titles) - columns) : len(titles)]:
        axes.tick_params(labelbottom=True)
    for axes, text, (_, look) in zip(all_axes, texts, titles, strict=False):
        axes.set_title(text, color=look.ink)
    middle = (left + columns * panel_size[0] / 2) / width
    fig.supxlabel(
        x_label, fontsize="medium", x=middle, y=(0.08 + bottom_space) / height, va="bottom"
    )
    fig.supylabel(
        y_label,
        fontsize="medium",
        x=0.06 / width,
        ha="left",
        y=(bottom + (height - bottom - title_height) / 2) / height,
    )
    return fig, list(all_axes[: len(titles)])


def figure_height(labels: Sequence[str], min_height: float = 3.2) -> float:
    """Return the height, in inches, of a figure whose plot has these labels beside it.

    The margins of the figure take 0.7 inches of it.
    """
    return max(
        min_height,
        _LINE_INCHES * sum(wrap_label(label, _LABEL_CHARS).count("\n") + 1 for label in labels)
        + 0.9,
    )


def label_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, Look]], height: float) -> None:
    """Write the name of each curve beside the plot, with a dotted line from the curve's end (x, y).

    The names do not overlap. Call this after the axis limits are set. ends: (x, y, name, look) of
    each curve. height: of the plot, inches.
    """
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    end_heights = np.array([to_axes.transform((x, y))[1] for x, y, _, _ in ends])
    order = np.argsort(end_heights, kind="stable")
    texts = [wrap_label(ends[index][2], _LABEL_CHARS) for index in order]
    places = place_apart(
        end_heights[order],
        np.array([text.count("\n") + 1 for text in texts]) * _LINE_INCHES / height,
    )
    for label_y, text, (x, y, _, look) in zip(
        places, texts, (ends[index] for index in order), strict=True
    ):
        connector: dict[str, Any] = {
            "arrowstyle": "-",
            "linestyle": ":",  # a plain line would look like more of the curve
            "color": look.color,
            "linewidth": 0.6,
            "shrinkA": 1,
            "shrinkB": 1,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            text,
            (x, y),
            va="center",
            color=look.ink,
            fontsize="small",
            arrowprops=connector,
            xytext=(1.06, label_y),
            textcoords="axes fraction",
            annotation_clip=False,
        )


def place_apart(wanted: np.ndarray, sizes: np.ndarray, length: float = 1.0) -> np.ndarray:
    """Return the ascending places nearest to ``wanted`` (least squares) without overlap.

    wanted: ascending. sizes: the sizes of the placed objects. The objects lie between 0 and
    ``length`` if all of them fit.
    """
    stacked = np.cumsum(sizes) - sizes / 2  # the places of objects stacked without gaps
    pools: list[list[float]] = []  # [sum, count] of touching neighbours
    for place in wanted - stacked:
        pools.append([place, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    level = np.concatenate([np.full(int(count), total / count) for total, count in pools])
    return np.clip(level, 0, max(0.0, length - sizes.sum())) + stacked


def wrap_label(text: str, width: int = 34) -> str:
    """Return a label broken into lines of at most ``width`` characters, if possible at commas."""
    parts = [part.replace(" ", "\xa0") for part in text.split(", ")]
    return textwrap.fill(", ".join(parts), width).replace("\xa0", " ")


def set_log_axis(axes: "Axes") -> None:
    """Make the x axis logarithmic, with plain numbers: powers would need formulas in texts."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def set_round_axis(axes: "Axes", last: int) -> None:
    """Set an axis of integer rounds from 0 to ``last``.

    The longest curve then ends at the edge of the plot, where its label is.
    """
    axes.set_xlim(0, max(1, last))
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # MaxNLocator
