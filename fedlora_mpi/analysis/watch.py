"""Show a running run in the terminal, from its log: curve, time left, load of the ranks."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import numpy as np

from ..core.escapes import escape_line
from ..core.extras import extra_imports
from ..core.units import format_seconds
from ..store.files import StoreError
from ..store.lock import is_held
from ..store.reader import RunFiles
from .load import RankLoad, measure_load
from .scores import score_names

Line = list[tuple[str, str]]  # parts of a line: (text, style of rich)

_RECENT_ROUNDS = 20  # the last rounds, from which the time left and the load are computed
_MAX_RANK_BARS = 12  # largest number of ranks with a bar
_STAGES = {
    "train": "blue",
    "evaluate": "yellow",
    "exchange": "cyan",
    "other": "bright_black",
    "waiting": "dim",
}
# A run may have stopped if the log has no new row for so many seconds and so many mean rounds.
_QUIET_SECONDS = 60.0
_QUIET_ROUNDS = 5
_MAX_FAILED_READS = 10  # an error is raised after so many failed reads in a row


@dataclass(frozen=True)
class RunStatus:
    """The content of the log at one moment."""

    path: Path
    config: dict[str, Any]
    rounds: dict[str, np.ndarray]  # [T]
    rank_load: RankLoad | None  # over the last rounds
    seconds_quiet: float  # seconds since the log changed
    is_running: bool | None = None  # whether a process holds the run's lock; None: unknown

    @classmethod
    def read(cls, path: Path) -> "RunStatus":
        """Read the log now. Raises StoreError (a ValueError) if there is no valid log."""
        is_running = is_held(path)  # before the log: the log of a run that has ended is its last
        files = RunFiles(path)
        rows = files.require_columns("train_loss")
        rounds, ranks = rows["rounds"], rows["ranks"]
        recent_load = (
            measure_load(ranks, files.checked_config, slice(-_RECENT_ROUNDS, None))
            if ranks
            else None
        )
        quiet = max(0.0, time.time() - (path / "log.h5").stat().st_mtime)
        return cls(path, files.checked_config, rounds, recent_load, quiet, is_running)

    @property
    def round(self) -> int:
        """The number of the last logged round; 0 if there is none."""
        return int(self.rounds["round"][-1]) if len(self.rounds["round"]) else 0

    @property
    def is_done(self) -> bool:
        """Whether all rounds are done."""
        return self.round >= self.config["rounds"]

    @property
    def seconds_per_round(self) -> float:
        """Mean seconds of the last rounds; 0 before the first round."""
        return float(self._seconds[-_RECENT_ROUNDS:].mean()) if self.round else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of all logged rounds."""
        return float(self._seconds.sum())

    @property
    def _seconds(self) -> np.ndarray:
        return sum(
            (v for n, v in self.rounds.items() if n.startswith("seconds_")),
            np.zeros(len(self.rounds["round"])),
        )


def watch(path: Path, interval: float, single_frame: bool) -> None:
    """Show the run until its last round or Ctrl-C.

    On a terminal it shows a live view, elsewhere a line per round. It waits for a folder that is
    not there yet, and for a stopped run, because a resume or the scheduler may continue it.

    interval: seconds between two reads of the log. single_frame: show one frame and return. Raises
    ValueError if ``path`` is no run folder or rich is missing.
    """
    if not 0.1 <= interval <= 3600:
        raise ValueError(f"--every = {interval:g}: must be from 0.1 to 3600 seconds")
    try:
        if not (single_frame or os.path.lexists(path)):
            _wait_for_folder(path, interval)
        status = RunStatus.read(path)
    except KeyboardInterrupt:
        return
    if single_frame:
        print(plain_text(render_frame(status, *get_terminal_size((80, 24)))))
    elif sys.stdout.isatty():
        _watch_live(status, interval)
    else:
        with suppress(KeyboardInterrupt):
            _follow_run(
                status,
                interval,
                lambda new_status: print(
                    plain_text([[*_status_line(new_status), (" · ", ""), *_pace_line(new_status)]]),
                    flush=True,
                ),
            )


def _wait_for_folder(path: Path, interval: float) -> None:
    """Return when there is something at ``path``: a run's folder appears with its log."""
    print(
        f"fedlora-mpi: waiting for {escape_line(path)}, which is not there yet; Ctrl-C ends this",
        file=sys.stderr,
        flush=True,
    )
    while not os.path.lexists(path):
        time.sleep(interval)


def render_frame(status: RunStatus, width: int, height: int) -> list[Line]:
    """Return the view as at most ``height`` lines of at most ``width`` characters."""
    loads = _load_lines(status.rank_load, width) if status.rank_load else []
    header = [_title_line(status), _status_line(status), _pace_line(status)]
    room = height - len(header) - len(loads) - 4
    if room < 3:  # leave out the load rather than the curve
        loads, room = [], height - len(header) - 3
    names = ("accuracy", *score_names(status.config, status.rounds), "train_loss")
    name = next((n for n in names if np.isfinite(status.rounds.get(n, np.nan)).any()), None)
    if name is None:
        return [_truncate(line, width) for line in (*header, *loads)][:height]
    y = status.rounds[name].astype(float)
    is_known = np.isfinite(y)
    x = status.rounds["round"][is_known]
    curve_rows = braille_curve(
        x,
        y[is_known],
        (0, max(status.config["rounds"], int(x[-1]))),
        width - 9,
        max(3, min(room, 16)),
    )
    format_value = (lambda v: f"{v:7.2%}") if name == "accuracy" else (lambda v: f"{v:7.4g}")
    low, high = y[is_known].min(), y[is_known].max()
    labels = [format_value(high), *[" " * 7] * (len(curve_rows) - 2), format_value(low)]
    rows = zip(labels, curve_rows, strict=True)
    body: list[Line] = [[(f"{side:>7} │", "dim"), (row, "green")] for side, row in rows]
    footer: Line = [(f"{'':8}└ {name} by round, 0 to {status.config['rounds']}", "dim")]
    return [_truncate(line, width) for line in (*header, *body, footer, *loads)][:height]


def braille_curve(
    x: np.ndarray, y: np.ndarray, span: tuple[float, float], width: int, height: int
) -> list[str]:
    """Return a line through the points (x ascending, y), drawn with Braille characters.

    A character has 2 by 4 dots. The curve fills ``height`` lines from the lowest y to the highest.
    span: x at the left and at the right edge.
    """
    dots = np.zeros((4 * height, 2 * width), bool)
    low, high = y.min(), y.max()
    columns = np.arange(2 * width)
    x_at = span[0] + columns / (2 * width - 1) * (span[1] - span[0])
    inside = (x_at >= x[0]) & (x_at <= x[-1])
    inside[np.abs(x_at - x[-1]).argmin()] = True  # so that a single point is visible
    level = np.interp(x_at, x, y)
    row = np.round((high - level) / ((high - low) or 1) * (4 * height - 1)).astype(int)
    for column, previous in zip(
        columns[inside], np.maximum(columns[inside] - 1, columns[inside][0]), strict=True
    ):
        top, bottom = sorted((row[column], row[previous] + np.sign(row[column] - row[previous])))
        dots[top : bottom + 1, column] = True
    # the bit of each dot in Unicode's Braille patterns
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = (dots.reshape(height, 4, width, 2) * bits[None, :, None, :]).sum(axis=(1, 3))
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def plain_text(lines: Sequence[Line]) -> str:
    """Return the lines as text without colours."""
    return "\n".join("".join(escape_line(text) for text, _ in line).rstrip() for line in lines)


def _truncate(line: Line, width: int) -> Line:
    """Return the first ``width`` characters of a line, escaped for a terminal."""
    line = [(escape_line(text), style) for text, style in line]
    ends = np.cumsum([0, *(len(text) for text, _ in line)])
    return [
        (text[: max(0, width - end)], style) for (text, style), end in zip(line, ends, strict=False)
    ]


def _title_line(status: RunStatus) -> Line:
    config = status.config
    clients = config["data"]["partition"].get("clients", "?")
    return [
        (str(status.path), "bold"),
        (
            f"  {config['algorithm']['name']} on {config['data'].get('dataset', '?')}, {clients} "
            "clients",
            "",
        ),
    ]


def _status_line(status: RunStatus) -> Line:
    """Return the line with the last round and the last accuracy."""
    total, rounds = status.config["rounds"], status.rounds
    line: Line = [(f"round {status.round}/{total}", "bold")]
    accuracy = rounds.get("accuracy", np.zeros(0))
    if len(evaluated := np.flatnonzero(np.isfinite(accuracy))):
        last_row = evaluated[-1]
        worst = (
            f" (worst client {rounds['accuracy_worst'][last_row]:.2%})"
            if "accuracy_worst" in rounds
            else ""
        )
        when = (
            ""
            if rounds["round"][last_row] == status.round
            else f" after round {rounds['round'][last_row]}"
        )
        line.append((f" · accuracy {accuracy[last_row]:.2%}{worst}{when}", "green"))
    for name in score_names(status.config, rounds):
        if len(known := rounds[name][np.isfinite(rounds[name])]):
            line.append((f" · {'test loss' if name == 'loss' else name} {known[-1]:.4g}", "green"))
    return line


def progress_texts(status: RunStatus) -> tuple[str, str, str]:
    """Return the last round of all, the last accuracy ("" without one), and the time it took."""
    accuracy = status.rounds.get("accuracy", np.zeros(0))
    known = accuracy[np.isfinite(accuracy)]
    return (
        f"{status.round}/{status.config['rounds']}",
        f"{known[-1]:.2%}" if len(known) else "",
        format_seconds(status.elapsed),
    )


def _pace_line(status: RunStatus) -> Line:
    """Return the line with the training loss, the speed and the time left."""
    if not status.round:
        stopped = [(" · stopped", "red")] if status.is_running is False else []
        return [("no round yet", ""), *stopped]
    line: Line = [
        (
            f"train loss {status.rounds['train_loss'][-1]:.4f} · "
            f"{format_seconds(status.seconds_per_round)} a round",
            "",
        )
    ]
    rounds_left = status.config["rounds"] - status.round
    if status.is_done:
        line.append((f" · done in {format_seconds(status.elapsed)}", "bold"))
    else:
        line.append((f" · {format_seconds(rounds_left * status.seconds_per_round)} left", "bold"))
    if not status.is_done and status.is_running is False:
        return [*line, (" · stopped", "red")]
    if not status.is_done and status.seconds_quiet > max(
        _QUIET_SECONDS, _QUIET_ROUNDS * status.seconds_per_round
    ):
        doubt = "" if status.is_running else ": stopped?"
        line.append((f" · no row for {format_seconds(status.seconds_quiet)}{doubt}", "red"))
    return line


def _load_lines(rank_load: RankLoad, width: int) -> list[Line]:
    """Return a bar for each rank; of many ranks, only the busiest and the idlest."""
    seconds_of_stages = np.stack(list(rank_load.seconds.values()))  # [stages, R]
    ranks, max_seconds = (
        np.arange(seconds_of_stages.shape[1]),
        seconds_of_stages.sum(axis=0).max() or 1.0,
    )
    if len(ranks) > _MAX_RANK_BARS:
        by_work = np.argsort(
            -(seconds_of_stages.sum(axis=0) - rank_load.seconds["waiting"]), kind="stable"
        )
        ranks = np.sort(np.r_[by_work[: _MAX_RANK_BARS // 2], by_work[-_MAX_RANK_BARS // 2 :]])
    balance = "" if np.isnan(rank_load.balance) else f", workers {rank_load.balance:.0%} balanced"
    omitted = (
        ""
        if len(ranks) == seconds_of_stages.shape[1]
        else f"; the busiest and idlest of {seconds_of_stages.shape[1]} ranks"
    )
    lines: list[Line] = [[(f"seconds a round{balance}{omitted}: ", ""), *_legend_line(rank_load)]]
    bar_width = max(10, width - 20)
    for rank in ranks:
        ends = np.round(
            np.cumsum([rank_load.seconds[stage][rank] for stage in _ordered_stages(rank_load)])
            / max_seconds
            * bar_width
        ).astype(int)
        line: Line = [(f"{rank:5d} ", "dim")]
        for stage, start, end in zip(_ordered_stages(rank_load), (0, *ends), ends, strict=False):
            line.append((_stage_symbol(stage) * (end - start), _STAGES.get(stage, "")))
        lines.append([*line, (f" {seconds_of_stages[:, rank].sum():.3g} s", "dim")])
    return lines


def _ordered_stages(rank_load: RankLoad) -> list[str]:
    return [
        *(s for s in _STAGES if s in rank_load.seconds),
        *(s for s in rank_load.seconds if s not in _STAGES),
    ]


def _stage_symbol(stage: str) -> str:
    """Return the character of a stage's bar, which makes bars readable without colours."""
    return {"train": "█", "evaluate": "▓", "exchange": "▒", "waiting": "·"}.get(stage, "░")


def _legend_line(rank_load: RankLoad) -> Line:
    return [
        (f"{_stage_symbol(stage)} {stage} ", _STAGES.get(stage, ""))
        for stage in _ordered_stages(rank_load)
    ]


def _watch_live(status: RunStatus, interval: float) -> None:
    """Redraw the view until the run ends; its last state stays on the screen."""
    with extra_imports("rich", "analysis", "the live view", "use --once"):
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    console = Console()

    def render(new_status):
        return Text("\n", no_wrap=True, overflow="ellipsis").join(
            Text.assemble(*line) for line in render_frame(new_status, console.width, console.height)
        )

    last = status
    view = Live(render(status), console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), view as live:

        def show(new_status: RunStatus) -> None:
            nonlocal last
            last = new_status
            live.update(render(new_status), refresh=True)

        _follow_run(status, interval, show, show_always=True)
    console.print(render(last))


def _follow_run(
    status: RunStatus, interval: float, show: Callable[[RunStatus], None], show_always: bool = False
) -> None:
    """Call ``show`` for every new row, and when the run stops or goes on, until its last round;
    with ``show_always`` at every read.
    """
    show(status)
    failed = 0
    while not status.is_done:
        time.sleep(interval)
        try:
            new_status = RunStatus.read(status.path)
        except (StoreError, OSError):  # a resume may be replacing the log
            failed += 1
            if failed >= _MAX_FAILED_READS:
                raise
            continue
        is_new = (new_status.round, new_status.is_running) != (status.round, status.is_running)
        failed, status = 0, new_status
        if is_new or show_always:
            show(new_status)
