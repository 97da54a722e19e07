"""What a sweep shows while it runs: a live table on a terminal, else a line for each run."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from ..analysis.watch import RunStatus, progress_texts
from ..core.escapes import escape_line
from ..core.units import format_seconds
from ..store.files import StoreError
from .grid import Job

_STYLES = {"running": "bold", "done": "green", "failed": "red", "pruned": "yellow"}
_SHOWN_FIRST = ("running", "failed", "stopped")  # in a table that is longer than the terminal
_REFRESH_SECONDS = 1.0  # from one look into the logs to the next


class View:
    """Prints a line on stderr when a run ends.

    states: {name of a run: its state} when the sweep begins. count_runs: how many runs there are,
    those of a search included that are not known yet.
    """

    def __init__(
        self, title: str, states: Mapping[str, str], count_runs: Callable[[], int]
    ) -> None:
        self._title, self.states, self._count_runs = title, dict(states), count_runs
        self._texts: dict[str, tuple[str, ...]] = {}  # round, accuracy and seconds by run

    def __enter__(self) -> "View":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        return

    def begin(self, job: Job) -> None:
        """Note that a run has started."""
        self.states[job.name] = "running"

    def end(self, job: Job, state: str, seconds: float) -> None:
        """Note that a run has ended."""
        self.states[job.name] = state
        self._texts[job.name] = _log_texts(job)
        round_, accuracy, _ = self._texts[job.name]
        text = f"{state} after {format_seconds(seconds)}, round {round_}"
        accuracy_note = f", accuracy {accuracy}" if accuracy else ""
        ended = sum(state not in ("waiting", "running") for state in self.states.values())
        self._print(f"[{ended}/{self._count_runs()}] {job.name}: {text}{accuracy_note}")

    def refresh(self, running: Iterable[Job]) -> None:
        """Show how far the running runs are."""

    def _print(self, line: str) -> None:
        print(escape_line(line), file=sys.stderr, flush=True)

    def counts(self) -> str:
        """How many runs are in each state, in words."""
        counts = Counter(self.states.values())
        counts["waiting"] += self._count_runs() - len(self.states)
        return ", ".join(f"{number} {state}" for state, number in counts.items() if number > 0)


class LiveView(View):
    """A table on the terminal that is drawn anew each second. Needs rich."""

    def __init__(
        self, title: str, states: Mapping[str, str], count_runs: Callable[[], int]
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(title, states, count_runs)
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False)
        self._refreshed = 0.0

    def __enter__(self) -> "LiveView":
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.update(self._table(), refresh=True)
        self._live.__exit__(kind, error, traceback)

    def refresh(self, running: Iterable[Job]) -> None:
        """Show how far the running runs are."""
        if time.monotonic() - self._refreshed < _REFRESH_SECONDS:
            return
        self._refreshed = time.monotonic()
        self._texts |= {job.name: _log_texts(job) for job in running}
        self._live.update(self._table(), refresh=True)

    def _print(self, line: str) -> None:
        pass  # the table has it

    def _table(self):
        from rich.table import Table
        from rich.text import Text

        title = Text(escape_line(f"{self._title}: {self.counts()}"), style="bold")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading, side in (("run", "left"), ("state", "left")):
            table.add_column(heading, justify=side, overflow="ellipsis", no_wrap=True)
        for heading in ("round", "accuracy", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        names = [*self.states]
        if len(names) > (room := max(1, self._console.height - 4)):
            names.sort(key=lambda name: self.states[name] not in _SHOWN_FIRST)
            names = names[:room]
        for name in names:
            state = self.states[name]
            texts = self._texts.get(name, ("", "", ""))
            cells = (escape_line(text) for text in (name, state, *texts))
            table.add_row(*(Text(cell, style=_STYLES.get(state, "dim")) for cell in cells))
        return table


def make_view(title: str, states: Mapping[str, str], count_runs: Callable[[], int]) -> View:
    """Return the live table if stdout is a terminal and rich is there, else plain lines."""
    if sys.stdout.isatty():
        try:
            return LiveView(title, states, count_runs)
        except ImportError:
            return View(title, states, count_runs)
    return View(title, states, count_runs)


def _log_texts(job: Job) -> tuple[str, str, str]:
    """Return the last round of all, the accuracy and the seconds of a run, as its log has them."""
    try:
        return progress_texts(RunStatus.read(job.folder))
    except (StoreError, OSError):  # not there yet, or a resume is replacing it
        return f"0/{job.config.rounds}", "", ""
