"""How every figure looks. matplotlib is imported when a figure is made."""

import io
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; their yellow, too pale for a line, is grey here.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
GREY = "#777777"
WIDTH = 7.2  # inches, of a figure over the whole page
SETTINGS = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "pdf.fonttype": 42,  # what publishers ask for
    "svg.hashsalt": "fedlora_mpi",  # the same figure, the same bytes
    "savefig.dpi": 150,
}
_LINE = 11.5 / 72  # inches between two labels


class Look(NamedTuple):
    """Of a group, in every figure."""

    color: str
    dash: str | tuple

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
        content = io.BytesIO()
        about = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
        self.figure.savefig(content, format=kind, metadata=about)
        return content.getvalue()


@contextmanager
def styled():
    """Figures made and saved within look alike, whatever the user's settings. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'fedlora-mpi[analysis]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def looks(number: int) -> list[Look]:
    """So many that differ, as far as there are 32."""
    return [Look(COLORS[at % len(COLORS)], DASHES[at // len(COLORS) % len(DASHES)]) for at in range(number)]


def figure(width: float, height: float) -> "Figure":
    """An empty one, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(number: int, width: float = 2.3, height: float = 1.9, columns: int = 3) -> "tuple[Figure, list[Axes]]":
    """So many plots with common axes, row by row; their axis titles are at the rim."""
    columns = min(columns, number)
    rows = -(-number // columns)
    drawn = figure(max(3.6, width * columns), height * rows + 0.4)
    every = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in every[number:]:
        axes.remove()
    for axes in every[max(0, number - columns) : number]:
        axes.tick_params(labelbottom=True)
    return drawn, list(every[:number])


def label_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, Look]], height: float) -> None:
    """The name of each curve beside the plot, none over another, with a thin line from its end (x, y).

    Call it when the limits are set; ``height`` of the plot, inches.
    """
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    at = np.array([to_axes.transform((x, y))[1] for x, y, _, _ in ends])
    order = np.argsort(at, kind="stable")
    places = apart(at[order], _LINE / height)
    for place, (x, y, text, look) in zip(places, (ends[index] for index in order), strict=True):
        line = {"arrowstyle": "-", "color": look.color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2}
        where = {"xytext": (1.04, place), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(text, (x, y), va="center", color=look.ink, fontsize="small", arrowprops=line, **where)


def apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """The ascending places nearest to ``wanted`` (ascending) that are ``gap`` from each other (least squares)."""
    pools: list[list[float]] = []  # [sum, count] of neighbours that push each other
    for index, place in enumerate(wanted):
        pools.append([place - index * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    level = np.concatenate([np.full(int(count), total / count) for total, count in pools])
    return level + gap * np.arange(len(wanted))


def wrapped(text: str, width: int = 34) -> str:
    """A label on several lines."""
    return textwrap.fill(text, width)


def whole_rounds(axes: "Axes") -> None:
    """Rounds are integers from 0."""
    axes.set_xlim(0, None)
    axes.xaxis.get_major_locator().set_params(integer=True)
