"""What rank 0 tells the user while a run goes on."""

import sys
import time


class Progress:
    """One live line on a terminal; a line per round, at most one a second, in a file."""

    def __init__(self, rounds: int, done: int) -> None:
        self._rounds, self._first = rounds, done
        self._start, self._said = time.perf_counter(), 0.0
        self._live = sys.stderr.isatty()

    def tell(self, round_: int, row: dict[str, float]) -> None:
        """Show the row of round ``round_`` (counted from 1)."""
        now = time.perf_counter()
        last = round_ == self._rounds
        if not self._live and not last and now - self._said < 1 and round_ > self._first + 1:
            return
        self._said = now
        left = (now - self._start) / (round_ - self._first) * (self._rounds - round_)
        shown = [f"round {round_}/{self._rounds}"]
        if row["accuracy"] == row["accuracy"]:  # not evaluated: NaN
            shown.append(
                f"accuracy {row['accuracy']:.2%} (worst client {row['accuracy_worst']:.2%})"
            )
        shown.append(f"train loss {row['train_loss']:.4f}")
        seconds = sum(value for name, value in row.items() if name.startswith("seconds_"))
        shown.append(f"{row['clients'] / seconds:.1f} clients/s")
        shown.append(f"{_duration(left)} left")
        end = "\r" if self._live and not last else "\n"
        print(
            ("\x1b[2K" if self._live else "") + " · ".join(shown),
            end=end,
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
