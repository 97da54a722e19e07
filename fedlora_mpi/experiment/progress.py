"""What rank 0 prints about the progress of a run."""

import sys
import time
from collections.abc import Sequence


class Progress:
    """The progress line on standard error.

    On a terminal it is one line that is updated. In a file it is a line per round, at most one per
    second. scores: columns that it shows beside the accuracy.
    """

    def __init__(self, rounds: int, rounds_done: int, scores: Sequence[str] = ()) -> None:
        self._rounds, self._resumed_round, self._scores = rounds, rounds_done, scores
        self._start, self._last_shown = time.perf_counter(), 0.0
        self._is_terminal = sys.stderr.isatty()

    def show(self, round_: int, row: dict[str, float]) -> None:
        """Print the row of round ``round_`` (counted from 1)."""
        now = time.perf_counter()
        is_last = round_ == self._rounds
        if (
            not self._is_terminal
            and not is_last
            and now - self._last_shown < 1
            and round_ > self._resumed_round + 1
        ):
            return
        self._last_shown = now
        seconds_left = (
            (now - self._start) / (round_ - self._resumed_round) * (self._rounds - round_)
        )
        parts = [f"round {round_}/{self._rounds}"]
        if row["accuracy"] == row["accuracy"]:  # not evaluated: NaN
            parts.append(
                f"accuracy {row['accuracy']:.2%} (worst client {row['accuracy_worst']:.2%})"
            )
        for name in self._scores:
            if row[name] == row[name]:
                parts.append(f"{'test loss' if name == 'loss' else name} {row[name]:.4g}")
        parts.append(f"train loss {row['train_loss']:.4f}")
        seconds = sum(value for name, value in row.items() if name.startswith("seconds_"))
        parts.append(f"{row['clients'] / seconds:.1f} clients/s")
        parts.append(f"{_clock_text(seconds_left)} left")
        end = "\r" if self._is_terminal and not is_last else "\n"
        print(
            ("\x1b[2K" if self._is_terminal else "") + " · ".join(parts),
            end=end,
            file=sys.stderr,
            flush=True,
        )


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
