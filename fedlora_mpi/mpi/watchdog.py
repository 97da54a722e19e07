"""A thread that ends a run when a process stalls, and names the rank and the stage."""

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..store import nolinks
from ..store.files import StoreError, open_for_reading, write_atomic
from ..store.run_folder import SUBFOLDERS
from .comm import Comm
from .launch import end_launcher


@contextmanager
def watch_progress(comm: Comm, timeout: float, folder: Path, way_out: str) -> Iterator[None]:
    """End all ranks after ``timeout`` seconds without a beat of ``comm.heartbeat``; 0: never.

    The message names rank, round and stage; the stack of every thread follows. If some library
    keeps Python's lock (GIL), this thread cannot run either. Then the process ends after 1.25
    ``timeout`` and shows only the stacks. A frozen process is detected by its missing signs of life
    in the run ``folder`` (see ``LifeSigns``). They also reveal that all ranks wait for each other
    because a link is down. way_out: the end of the message.
    """
    if not timeout:
        yield
        return
    stopped, life_signs = threading.Event(), LifeSigns(comm, folder / ".pulse", timeout)
    thread = threading.Thread(
        target=_watch,
        args=(comm, timeout, life_signs, way_out, stopped.wait),
        daemon=True,
        name="watchdog",
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()
        life_signs.remove()


def _watch(
    comm: Comm,
    timeout: float,
    life_signs: "LifeSigns",
    way_out: str,
    wait_stopped: Callable[[float], bool],
) -> None:
    """Check for progress until ``wait_stopped`` returns True."""
    while not wait_stopped(min(timeout / 8, 5.0)):
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(1.25 * timeout, exit=True, file=sys.__stderr__)
        if comm.heartbeat.stalled_seconds() > timeout:
            _end_run(
                comm,
                f"rank {comm.rank} of {comm.size}: no progress",
                timeout,
                str(comm.heartbeat),
                way_out,
            )
        for rank, text in life_signs.silent_ranks():
            _end_run(comm, f"rank {rank} of {comm.size}: no sign of life", timeout, text, way_out)
        if text := life_signs.deadlock_stage():
            _end_run(
                comm,
                "all ranks wait for each other: their messages do not get through",
                timeout,
                text,
                way_out,
            )


def _end_run(comm: Comm, problem: str, timeout: float, stage: str, way_out: str) -> None:
    """Print the message and the stacks of this rank, and end all ranks."""
    with suppress(OSError):  # standard error may be closed
        line = f"\nfedlora-mpi: {problem} for {timeout:g} s (faults.timeout) in {stage}; {way_out}"
        print(line, file=sys.__stderr__, flush=True)
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback(file=sys.__stderr__)
    end_launcher(10)
    # SIGALRM ends the process if MPI's lock cannot be taken
    signal.setitimer(signal.ITIMER_REAL, 10)
    comm.abort()


class LifeSigns:
    """One file per rank, which changes four times in ``timeout`` seconds while its process runs.

    It also changes while the process waits. Rank 0 reads the files of all others, and rank 1 that
    of rank 0; clocks are not compared. Short runs write no file. A file holds a number that
    changes, ``Heartbeat.beats``, whether the rank waits, and its stage.
    """

    def __init__(self, comm: Comm, folder: Path, timeout: float) -> None:
        self._comm, self._folder, self._timeout = comm, folder, timeout
        self._watched_ranks = (
            range(1, comm.size) if comm.rank == 0 else (0,) if comm.rank == 1 else ()
        )
        # rank -> content of its file, and the time of its last change
        self._last_seen: dict[int, tuple[str, float]] = {}
        self._last_sign_time, self._sign_number = time.monotonic(), 0
        # the signs of all ranks while all wait, and the time of their last change
        self._waiting_since: tuple[list[list[str]], float] = [], self._last_sign_time

    def silent_ranks(self) -> list[tuple[int, str]]:
        """Return the ranks whose files no longer change, with their last stages.

        Also writes this rank's file when a quarter of the timeout has passed.
        """
        now = time.monotonic()
        if (
            self._comm.size == 1
            or now - self._last_sign_time < self._timeout / 4
            or not self._folder.parent.is_dir()
        ):
            return []
        self._last_sign_time, self._sign_number = now, self._sign_number + 1
        heartbeat, run = self._comm.heartbeat, self._folder.parent
        activity = "waits" if heartbeat.is_waiting else "works"
        sign = f"{self._sign_number} {heartbeat.beats} {activity} {heartbeat}"
        with nolinks.open_folder(self._folder, run, create=True):
            write_atomic(self._folder / str(self._comm.rank), sign.encode(), run)
        return [silent for rank in self._watched_ranks if (silent := self._check_rank(rank, now))]

    def deadlock_stage(self) -> str:
        """Return the stage of this rank if all ranks wait for each other, otherwise "".

        They do so if all have waited without a beat for longer than the timeout. A message that
        takes so long looks the same. Every rank checks by itself, because none can inform another.
        """
        heartbeat, now = self._comm.heartbeat, time.monotonic()
        if self._comm.size == 1 or not heartbeat.is_waiting:
            self._waiting_since = [], now
            return ""
        signs = [self._read_sign(rank).split(" ", 3)[1:3] for rank in heartbeat.members]
        if signs != self._waiting_since[0] or not all(sign[1:] == ["waits"] for sign in signs):
            self._waiting_since = signs, now
        return str(heartbeat) if now - self._waiting_since[1] > self._timeout else ""

    def remove(self) -> None:
        """Remove this rank's file at a normal end; rank 0 also those that dead ranks have left."""
        with suppress(OSError):
            # the last rank removes the folder
            nolinks.clear_folder(self._folder, self._is_unneeded, self._folder.parent)

    def _is_unneeded(self, name: str) -> bool:
        rank = int(name.strip(".tmp")) if SUBFOLDERS[".pulse"](name) else -1
        is_of_dead_rank = rank >= 0 and rank not in self._comm.heartbeat.members
        return name == str(self._comm.rank) or self._comm.rank == 0 and is_of_dead_rank

    def _check_rank(self, rank: int, now: float) -> tuple[int, str] | None:
        text = self._read_sign(rank)
        old_text, since = self._last_seen.setdefault(rank, (text, now))
        if text != old_text:
            self._last_seen[rank] = text, now
            return None
        is_silent = now - since > self._timeout and rank in self._comm.heartbeat.members
        return (rank, text.split(" ", 3)[3]) if is_silent else None

    def _read_sign(self, rank: int) -> str:
        """Return the content of a rank's file."""
        with (
            suppress(OSError, StoreError),
            open_for_reading(self._folder / str(rank), self._folder.parent) as file,
        ):
            return file.read(1000).decode()
        return "0 0 works the set-up"
