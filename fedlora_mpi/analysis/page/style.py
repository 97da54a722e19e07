"""How every figure looks. matplotlib is imported when a figure is made."""

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; their yellow, too pale for a line, is
# grey here.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
GREY = "#777777"
DPI = 150  # of PNG
WIDTH = 7.2  # inches, of a figure over the whole page
SETTINGS = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    # inches; ticks may get a digit when their plot gets its place
    "figure.constrained_layout.w_pad": 0.12,
    "pdf.fonttype": 42,  # what publishers ask for
    "text.hinting": "none",  # so that text is as wide at any resolution
    "text.parse_math": False,  # a name with a $ is no formula
    "svg.hashsalt": "fedlora_mpi",  # the same figure, the same bytes
}
_LINE = 11.5 / 72  # inches between two labels
_LABEL = 40  # letters of a line of a label


class Look(NamedTuple):
    """Of a group, in every figure."""

    color: str
    dash: str | tuple
    named: bool = True  # else one of many, pale and without a label

    @property
    def ink(self) -> str:
        """The colour, dark enough for text on white."""
        parts = [int(self.color[at : at + 2], 16) for at in (1, 3, 5)]
        return "#" + "".join(f"{int(0.72 * part):02x}" for part in parts)


class Drawn(NamedTuple):
    """A figure with its file name, heading and caption."""

    name: str
    title: str
    caption: str
    figure: "Figure"

    def file(self, kind: str) -> bytes:
        """As ``png``, ``pdf`` or ``svg``, the same bytes for the same runs."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_pdf import FigureCanvasPdf
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        if self.figure.get_layout_engine():  # places are found once, not for each kind
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
        content = io.BytesIO()  # by the canvases: savefig would draw everything twice
        self.figure.set_dpi(DPI)
        if kind == "png":
            FigureCanvasAgg(self.figure).print_png(content)
        elif kind == "pdf":
            FigureCanvasPdf(self.figure).print_pdf(content, metadata={"CreationDate": None})
        else:
            FigureCanvasSVG(self.figure).print_svg(content, metadata={"Date": None})
        return content.getvalue()


@contextmanager
def styled():
    """Figures made and saved within look alike, whatever the user's settings. Raises ValueError
    without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'fedlora-mpi[analysis]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def files_of(figures: Sequence[Drawn]) -> list[dict[str, bytes]]:
    """PNG, PDF and SVG of each, drawn on all cores; on one where a fork, which need not pickle
    figures, is not safe.
    """
    cores = min(len(os.sched_getaffinity(0)), len(figures)) if sys.platform == "linux" else 1
    if cores < 2:
        return [_files(figure) for figure in figures]
    with ProcessPoolExecutor(
        cores, get_context("fork"), _begin_to_draw, (figures, os.getpid())
    ) as pool:
        return list(pool.map(_files_at, range(len(figures))))


_inherited: list[Drawn] = []  # of a process that draws


def _begin_to_draw(figures: Sequence[Drawn], parent: int) -> None:
    """What a process does first: it inherits the figures, and ends when its parent has ended,
    however that was.
    """

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _inherited.extend(figures)


def _files_at(index: int) -> dict[str, bytes]:
    return _files(_inherited[index])


def _files(figure: Drawn) -> dict[str, bytes]:
    return {kind: figure.file(kind) for kind in ("png", "pdf", "svg")}


def looks(number: int) -> list[Look]:
    """So many that differ, as far as there are 32."""
    return [
        Look(COLORS[at % len(COLORS)], DASHES[at // len(COLORS) % len(DASHES)])
        for at in range(number)
    ]


def figure(width: float, height: float) -> "Figure":
    """An empty one, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(
    titles: Sequence[tuple[str, Look]], side: tuple[float, float], x: str, y: str, below: float = 0
) -> "tuple[Figure, list[Axes]]":
    """A plot under each title, up to three in a row, with common axes; ``side``: (width, height) of
    one, ``below``: what stays empty under all, inches.

    Margins are given, for to find them takes as long as to draw the figure.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    texts = [wrapped(title, int(13 * side[0])) for title, _ in titles]
    head = 0.1 + 0.17 * max(text.count("\n") + 1 for text in texts)  # inches
    left, bottom, between = 0.62, 0.55 + below, 0.22
    width = left + columns * side[0] + (columns - 1) * between + 0.15
    height = bottom + rows * (side[1] + head) + (rows - 1) * between
    drawn = Figure(figsize=(width, height))
    grid = {
        "left": left / width,
        "right": 1 - 0.15 / width,
        "bottom": bottom / height,
        "top": 1 - head / height,
    }
    grid |= {"wspace": between / side[0], "hspace": (between + head) / side[1]}
    every = drawn.subplots(
        rows, columns, sharex=True, sharey=True, squeeze=False, gridspec_kw=grid
    ).ravel()
    for axes in every[len(titles) :]:
        axes.remove()
    for axes in every[max(0, len(titles) - columns) : len(titles)]:
        axes.tick_params(labelbottom=True)
    for axes, text, (_, look) in zip(every, texts, titles, strict=False):
        axes.set_title(text, color=look.ink)
    middle = (left + columns * side[0] / 2) / width
    drawn.supxlabel(x, fontsize="medium", x=middle, y=(0.08 + below) / height, va="bottom")
    drawn.supylabel(
        y,
        fontsize="medium",
        x=0.06 / width,
        ha="left",
        y=(bottom + (height - bottom - head) / 2) / height,
    )
    return drawn, list(every[: len(titles)])


def tall_enough(labels: Sequence[str], least: float = 3.2) -> float:
    """The height of a figure, inches, whose plot has these labels beside it; its rim takes 0.7."""
    return max(least, _LINE * sum(wrapped(label, _LABEL).count("\n") + 1 for label in labels) + 0.9)


def label_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, Look]], height: float) -> None:
    """The name of each curve beside the plot, none over another, with a thin line from its end (x,
    y).

    Call it when the limits are set; ``height`` of the plot, inches.
    """
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    at = np.array([to_axes.transform((x, y))[1] for x, y, _, _ in ends])
    order = np.argsort(at, kind="stable")
    texts = [wrapped(ends[index][2], _LABEL) for index in order]
    places = apart(at[order], np.array([text.count("\n") + 1 for text in texts]) * _LINE / height)
    for place, text, (x, y, _, look) in zip(
        places, texts, (ends[index] for index in order), strict=True
    ):
        line = {
            "arrowstyle": "-",
            "color": look.color,
            "linewidth": 0.6,
            "shrinkA": 1,
            "shrinkB": 1,
            "relpos": (0, 0.5),
        }
        where = {"xytext": (1.06, place), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(
            text, (x, y), va="center", color=look.ink, fontsize="small", arrowprops=line, **where
        )


def apart(wanted: np.ndarray, sizes: np.ndarray, room: float = 1.0) -> np.ndarray:
    """The ascending places nearest to ``wanted`` (ascending, least squares) of what is ``sizes``
    large.

    Without overlap, and between 0 and ``room`` where there is enough.
    """
    ahead = np.cumsum(sizes) - sizes / 2  # where they would be, one upon the other
    pools: list[list[float]] = []  # [sum, count] of neighbours that push each other
    for place in wanted - ahead:
        pools.append([place, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    level = np.concatenate([np.full(int(count), total / count) for total, count in pools])
    return np.clip(level, 0, max(0.0, room - sizes.sum())) + ahead


def wrapped(text: str, width: int = 34) -> str:
    """A label on several lines."""
    return textwrap.fill(text, width)


def whole_rounds(axes: "Axes", last: int) -> None:
    """Rounds are integers from 0; the longest curve ends at the rim, where its label is."""
    axes.set_xlim(0, max(1, last))
    axes.xaxis.get_major_locator().set_params(integer=True)
