"""Stop a run: at the end of a round by SIGUSR1 or Ctrl-C, at once by a second Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.escapes import escape_line
from ..mpi.local_ranks import STOPPING
from ..store import checkpoint
from ..store.files import StoreError
from ..store.reader import RunFiles

StopRequests = list[int]  # the numbers of the signals that came


def collect_stop_signals() -> StopRequests:
    """A list that SIGUSR1 fills: the run then stops at the next round boundary, with a checkpoint.
    In another thread than the first, which gets no signals, it stays empty.
    """
    requests: StopRequests = []
    if _gets_signals():
        signal.signal(signal.SIGUSR1, lambda number, frame: requests.append(number))
    return requests


@contextmanager
def collect_interrupts(
    requests: StopRequests, lost_line: Callable[[], str], tells: bool
) -> Iterator[None]:
    """Inside, the first Ctrl-C goes into ``requests``; the second raises KeyboardInterrupt.

    lost_line: says what the second has lost; tells: whether this rank prints it.
    """
    previous = signal.getsignal(signal.SIGINT)
    if not _gets_signals() or previous is signal.SIG_IGN:  # ignored: in the background of a script
        yield
        return
    interrupts: list[int] = []

    def interrupt(number, frame) -> None:
        interrupts.append(number)
        requests.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt
        if tells:
            os.write(2, f"fedlora-mpi: {STOPPING}\n".encode())

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if tells:
            print(f"fedlora-mpi: {lost_line()}", file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


def lost_rounds_line(folder: Path, logged_round: int, rounds: int) -> str:
    """Which rounds a run in ``folder`` has lost that was stopped at once, and how to go on.

    logged_round: the last finished round, which the log has; rounds: of the whole run.
    """
    saved = max(checkpoint.committed_rounds(folder), default=0)
    first, last = saved + 1, min(logged_round + 1, rounds)
    lost = f"rounds {first} to {last} are" if last > first else f"round {last} is"
    origin = f"the newest checkpoint is of round {saved}" if saved else "there is no checkpoint yet"
    if last <= saved:
        lost, origin = "no round is", "the last one has its checkpoint"
    name = escape_line(folder)
    return (
        f"{name}: stopped at once; {lost} lost, {origin}; continue with 'fedlora-mpi resume {name}'"
    )


def lost_rounds_of(folder: Path, rounds: int) -> str:
    """``lost_rounds_line`` of a run that other processes have trained; "" before its folder."""
    try:
        logged = RunFiles(folder).rounds()["round"]
    except (StoreError, OSError):
        return ""
    return lost_rounds_line(folder, int(logged[-1]) if len(logged) else 0, rounds)


def _gets_signals() -> bool:
    return threading.current_thread() is threading.main_thread()
