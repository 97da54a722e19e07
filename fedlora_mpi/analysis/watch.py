"""A run in the terminal while it goes on, from its log alone: curve, time left, load of the ranks."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import numpy as np

from ..core.escapes import one_line
from ..core.units import duration
from ..store.files import StoreError
from ..store.reader import RunFiles
from .load import Load, load

Line = list[tuple[str, str]]  # parts of a line: text, and how rich shows it

_LAST = 20  # rounds from which the time left and the load are told
_FEW = 12  # ranks that are shown one by one
_STAGES = {
    "train": "blue",
    "evaluate": "yellow",
    "exchange": "cyan",
    "other": "bright_black",
    "waiting": "dim",
}
_QUIET = 60.0  # seconds without a row, and as many rounds' worth as the next, before it is told
_ROUNDS = 5
_PATIENCE = 10  # readings that may fail, one after the other


@dataclass(frozen=True)
class Seen:
    """What the log said at some moment."""

    path: Path
    config: dict[str, Any]
    rounds: dict[str, np.ndarray]  # [T]
    load: Load | None  # over the last rounds
    quiet: float  # seconds since the log changed

    @classmethod
    def read(cls, path: Path) -> "Seen":
        """Raises StoreError (a ValueError)."""
        files = RunFiles(path)
        rows = files.measured("train_loss")
        rounds, ranks = rows["rounds"], rows["ranks"]
        recent = load(ranks, files.settings, slice(-_LAST, None)) if ranks else None
        quiet = max(0.0, time.time() - (path / "log.h5").stat().st_mtime)
        return cls(path, files.settings, rounds, recent, quiet)

    @property
    def round(self) -> int:
        """The last one, 0 before the first."""
        return int(self.rounds["round"][-1]) if len(self.rounds["round"]) else 0

    @property
    def done(self) -> bool:
        """Whether no round is left."""
        return self.round >= self.config["rounds"]

    @property
    def pace(self) -> float:
        """Seconds of a round, mean over the last ones; 0 before the first."""
        return float(self._seconds[-_LAST:].mean()) if self.round else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of all rounds."""
        return float(self._seconds.sum())

    @property
    def _seconds(self) -> np.ndarray:
        return sum(
            (v for n, v in self.rounds.items() if n.startswith("seconds_")),
            np.zeros(len(self.rounds["round"])),
        )


def watch(path: Path, every: float, once: bool) -> None:
    """Show the run until its last round or Ctrl-C: a view on a terminal, else a line for each new
    round; ``once``: one frame.

    A run that was stopped is waited for, since a resume or the scheduler may go on with it. every:
    seconds between two looks. Raises ValueError: no run folder, no rich.
    """
    if not 0.1 <= every <= 3600:
        raise ValueError(f"--every = {every:g}: must be from 0.1 to 3600 seconds")
    seen = Seen.read(path)
    if once:
        print(plain(frame(seen, *get_terminal_size((80, 24)))))
    elif sys.stdout.isatty():
        _live(seen, every)
    else:
        with suppress(KeyboardInterrupt):
            _follow(
                seen,
                every,
                lambda now: print(plain([[*_status(now), (" · ", ""), *_pace(now)]]), flush=True),
            )


def frame(seen: Seen, width: int, height: int) -> list[Line]:
    """The view as lines of up to ``width`` letters, at most ``height`` of them."""
    loads = _loads(seen.load, width) if seen.load else []
    head = [_title(seen), _status(seen), _pace(seen)]
    room = height - len(head) - len(loads) - 4
    if room < 3:  # the curve is worth more
        loads, room = [], height - len(head) - 3
    name = next(
        (n for n in ("accuracy", "train_loss") if np.isfinite(seen.rounds.get(n, np.nan)).any()),
        None,
    )
    if name is None:
        return [_cut(line, width) for line in (*head, *loads)][:height]
    y = seen.rounds[name].astype(float)
    there = np.isfinite(y)
    x = seen.rounds["round"][there]
    drawn = curve(
        x, y[there], (0, max(seen.config["rounds"], int(x[-1]))), width - 9, max(3, min(room, 16))
    )
    tell = (lambda v: f"{v:7.2%}") if name == "accuracy" else (lambda v: f"{v:7.4g}")
    low, high = y[there].min(), y[there].max()
    sides = [tell(high), *[" " * 7] * (len(drawn) - 2), tell(low)]
    rows = zip(sides, drawn, strict=True)
    body: list[Line] = [[(f"{side:>7} │", "dim"), (row, "green")] for side, row in rows]
    foot: Line = [(f"{'':8}└ {name} by round, 0 to {seen.config['rounds']}", "dim")]
    return [_cut(line, width) for line in (*head, *body, foot, *loads)][:height]


def curve(
    x: np.ndarray, y: np.ndarray, span: tuple[float, float], width: int, height: int
) -> list[str]:
    """A line through the points (x ascending, y) in Braille, 2 by 4 dots a letter, from the lowest
    y to the highest.

    span: x at the left and at the right rim.
    """
    dots = np.zeros((4 * height, 2 * width), bool)
    low, high = y.min(), y.max()
    columns = np.arange(2 * width)
    at = span[0] + columns / (2 * width - 1) * (span[1] - span[0])
    inside = (at >= x[0]) & (at <= x[-1])
    inside[np.abs(at - x[-1]).argmin()] = True  # a lone point is seen
    level = np.interp(at, x, y)
    row = np.round((high - level) / ((high - low) or 1) * (4 * height - 1)).astype(int)
    for here, before in zip(
        columns[inside], np.maximum(columns[inside] - 1, columns[inside][0]), strict=True
    ):
        top, bottom = sorted((row[here], row[before] + np.sign(row[here] - row[before])))
        dots[top : bottom + 1, here] = True
    # of Unicode's Braille patterns
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = (dots.reshape(height, 4, width, 2) * bits[None, :, None, :]).sum(axis=(1, 3))
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def plain(lines: Sequence[Line]) -> str:
    """As text without colours."""
    return "\n".join("".join(one_line(text) for text, _ in line).rstrip() for line in lines)


def _cut(line: Line, width: int) -> Line:
    """The first ``width`` letters, as a terminal shows them."""
    line = [(one_line(text), style) for text, style in line]
    ends = np.cumsum([0, *(len(text) for text, _ in line)])
    return [
        (text[: max(0, width - end)], style) for (text, style), end in zip(line, ends, strict=False)
    ]


def _title(seen: Seen) -> Line:
    config = seen.config
    clients = config["data"]["partition"].get("clients", "?")
    return [
        (str(seen.path), "bold"),
        (
            f"  {config['algorithm']['name']} on {config['data'].get('dataset', '?')}, {clients} "
            "clients",
            "",
        ),
    ]


def _status(seen: Seen) -> Line:
    """The last round, and the last accuracy."""
    total, rounds = seen.config["rounds"], seen.rounds
    line: Line = [(f"round {seen.round}/{total}", "bold")]
    accuracy = rounds.get("accuracy", np.zeros(0))
    if len(evaluated := np.flatnonzero(np.isfinite(accuracy))):
        at = evaluated[-1]
        worst = (
            f" (worst client {rounds['accuracy_worst'][at]:.2%})"
            if "accuracy_worst" in rounds
            else ""
        )
        when = "" if rounds["round"][at] == seen.round else f" after round {rounds['round'][at]}"
        line.append((f" · accuracy {accuracy[at]:.2%}{worst}{when}", "green"))
    return line


def _pace(seen: Seen) -> Line:
    """What is left."""
    if not seen.round:
        return [("no round yet", "")]
    line: Line = [
        (f"train loss {seen.rounds['train_loss'][-1]:.4f} · {duration(seen.pace)} a round", "")
    ]
    if seen.done:
        line.append((f" · done in {duration(seen.elapsed)}", "bold"))
    else:
        line.append(
            (f" · {duration((seen.config['rounds'] - seen.round) * seen.pace)} left", "bold")
        )
    if not seen.done and seen.quiet > max(_QUIET, _ROUNDS * seen.pace):
        line.append((f" · no row for {duration(seen.quiet)}: stopped?", "red"))
    return line


def _loads(found: Load, width: int) -> list[Line]:
    """A bar for each rank, of many ranks the busiest and the idlest."""
    every = np.stack(list(found.seconds.values()))  # [stages, R]
    ranks, most = np.arange(every.shape[1]), every.sum(axis=0).max() or 1.0
    if len(ranks) > _FEW:
        by_work = np.argsort(-(every.sum(axis=0) - found.seconds["waiting"]), kind="stable")
        ranks = np.sort(np.r_[by_work[: _FEW // 2], by_work[-_FEW // 2 :]])
    balance = "" if np.isnan(found.balance) else f", workers {found.balance:.0%} balanced"
    more = (
        ""
        if len(ranks) == every.shape[1]
        else f"; the busiest and idlest of {every.shape[1]} ranks"
    )
    lines: list[Line] = [[(f"seconds a round{balance}{more}: ", ""), *_legend(found)]]
    room = max(10, width - 20)
    for rank in ranks:
        ends = np.round(
            np.cumsum([found.seconds[stage][rank] for stage in _ordered(found)]) / most * room
        ).astype(int)
        line: Line = [(f"{rank:5d} ", "dim")]
        for stage, start, end in zip(_ordered(found), (0, *ends), ends, strict=False):
            line.append((_letter(stage) * (end - start), _STAGES.get(stage, "")))
        lines.append([*line, (f" {every[:, rank].sum():.3g} s", "dim")])
    return lines


def _ordered(found: Load) -> list[str]:
    return [
        *(s for s in _STAGES if s in found.seconds),
        *(s for s in found.seconds if s not in _STAGES),
    ]


def _letter(stage: str) -> str:
    """What a bar is made of, so that it can be read without colours."""
    return {"train": "█", "evaluate": "▓", "exchange": "▒", "waiting": "·"}.get(stage, "░")


def _legend(found: Load) -> Line:
    return [(f"{_letter(stage)} {stage} ", _STAGES.get(stage, "")) for stage in _ordered(found)]


def _live(seen: Seen, every: float) -> None:
    """The view, drawn anew; its last state stays on the screen."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError as error:
        raise ValueError(
            "the live view needs rich: pip install 'fedlora-mpi[analysis]', or use --once"
        ) from error
    console = Console()

    def drawn(now):
        return Text("\n", no_wrap=True, overflow="ellipsis").join(
            Text.assemble(*line) for line in frame(now, console.width, console.height)
        )

    last = seen
    view = Live(drawn(seen), console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), view as live:

        def show(now: Seen) -> None:
            nonlocal last
            last = now
            live.update(drawn(now), refresh=True)

        _follow(seen, every, show, always=True)
    console.print(drawn(last))


def _follow(seen: Seen, every: float, show: Callable[[Seen], None], always: bool = False) -> None:
    """``show`` the run at every new row (``always``: at every look), until it ends."""
    show(seen)
    failed = 0
    while not seen.done:
        time.sleep(every)
        try:
            now = Seen.read(seen.path)
        except (StoreError, OSError):  # a resume puts another log in its place
            failed += 1
            if failed >= _PATIENCE:
                raise
            continue
        failed, new, seen = 0, now.round != seen.round, now
        if new or always:
            show(now)
