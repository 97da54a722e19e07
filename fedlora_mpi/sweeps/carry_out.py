"""Carry out the runs of a sweep, several at a time, each as a process of ``fedlora-mpi run``."""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..experiment.loop import STOPPED_EXIT
from ..experiment.processes import Pool, Slots, last_line
from ..experiment.stopping import collect_interrupts, collect_stop_signals
from .grid import Job
from .view import View

_POLL_SECONDS = 0.1
# exit codes of a run that was asked to stop: after a round, or before it could obey
_STOPPED_CODES = (STOPPED_EXIT, -signal.SIGUSR1, 128 + signal.SIGUSR1)


class Source(Protocol):
    """Where the next run comes from: a list, or a search that looks at the runs before it."""

    def next_job(self) -> Job | None:
        """Return the next run to start; None if there is none now."""

    def end(self, job: Job, code: int) -> str:
        """Note the exit code of a run, and return its state in a word."""

    def jobs_to_stop(self, running: Iterable[Job]) -> Sequence[Job]:
        """Return the running runs that are to stop after their round."""


class Grid:
    """The runs of a grid that are not done, in their order."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._waiting = deque(job for job in jobs if not (job.is_done or job.is_elsewhere))

    def next_job(self) -> Job | None:
        """Return the next run."""
        return self._waiting.popleft() if self._waiting else None

    def end(self, job: Job, code: int) -> str:
        """Return the state of a run by its exit code; a stop after its last round is none."""
        state = end_state(code)
        return "done" if state == "stopped" and job.has_all_rounds() else state

    def jobs_to_stop(self, running: Iterable[Job]) -> Sequence[Job]:
        """Return none: every run of a grid is trained to its end."""
        return ()


def end_state(code: int) -> str:
    """Return the state of a run that has ended with this exit code."""
    return {0: "done"}.get(code, "stopped" if code in _STOPPED_CODES else "failed")


def first_state(job: Job) -> str:
    """Return the state of a run before the sweep begins."""
    return "done" if job.is_done else "elsewhere" if job.is_elsewhere else "waiting"


def carry_out(source: Source, slots: Slots, ranks: int, view: View) -> dict[str, str]:
    """Run what ``source`` gives, ``slots.number`` at a time. Return a line for each failed run.

    Ctrl-C or SIGUSR1 stops the runs after their round, and starts no other; a second Ctrl-C raises
    KeyboardInterrupt and ends them at once.
    """
    requests = collect_stop_signals()
    running: dict[str, Job] = {}
    failures: dict[str, str] = {}
    told_to_stop: set[str] = set()
    with (
        _exit_by_signals(),
        view,
        Pool(slots, own_groups=True) as pool,
        collect_interrupts(requests, lambda: GO_ON, tells=True),
    ):
        while True:
            while not requests and pool.has_room and (job := source.next_job()):
                job.log.parent.mkdir(parents=True, exist_ok=True)
                pool.start(job.task(ranks))
                running[job.name] = job
                view.begin(job)
            if not running:
                return failures
            time.sleep(_POLL_SECONDS)
            for task, code, seconds in pool.collect_ended():
                job = running.pop(task.name)
                state = source.end(job, code)
                view.end(job, state, seconds)
                if state == "failed":
                    line = last_line(job.log).removeprefix("fedlora-mpi: ")
                    failures[job.name] = f"exit code {code}: {line} ({job.log})"
            stopping = running.values() if requests else source.jobs_to_stop(running.values())
            for name in {job.name for job in stopping} - told_to_stop:
                told_to_stop.add(name)
                pool.send_signal(signal.SIGUSR1, running[name].task(ranks))
            view.refresh(running.values())


GO_ON = "to go on, give the same command again"


@contextmanager
def _exit_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit, so that the runs end too."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous: Mapping[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {
            number: signal.signal(number, lambda number, frame: sys.exit(128 + number))
            for number in numbers
            if signal.getsignal(number) is not signal.SIG_IGN
        }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
