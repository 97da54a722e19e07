"""A thread that ends a run in which a process no longer gets on, and says which and where."""

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
from .comm import Comm
from .launch import end_launcher


@contextmanager
def watch_progress(comm: Comm, timeout: float, folder: Path, way_out: str) -> Iterator[None]:
    """Inside, ``timeout`` seconds without a beat of ``comm.heartbeat`` end all ranks; 0: none do.

    The end names rank, round and stage and shows the stack of every thread. Where even this thread
    cannot run, because some library keeps Python's lock, the stacks alone are shown, a quarter of
    the time later. A process that is stopped as a whole shows nothing: the others miss the signs of
    life that each rank puts into the run ``folder`` (see ``Signs``). By these a rank also sees that
    all wait for each other, because a link is down. way_out: the last words.
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
    """Look at the pulse until it is ``over``."""
    while not wait_stopped(min(timeout / 8, 5.0)):
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
    """End all ranks with the stacks of this one."""
    with suppress(OSError):  # nobody may read it
        line = f"\nfedlora-mpi: {problem} for {timeout:g} s (faults.timeout) in {stage}; {way_out}"
        print(line, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__)
    end_launcher(10)
    # SIGALRM ends the process where the lock of MPI is not to be had
    signal.setitimer(signal.ITIMER_REAL, 10)
    comm.abort()


class LifeSigns:
    """Files that change four times in ``timeout`` seconds as long as a rank's process runs at all,
    however long it waits.

    Rank 0 looks at those of all others, rank 1 at rank 0's; clocks are not compared. Short runs
    write none. A file holds a number that changes, how often the rank has moved, whether it waits,
    and where it is.
    """

    def __init__(self, comm: Comm, folder: Path, timeout: float) -> None:
        self._comm, self._folder, self._timeout = comm, folder, timeout
        self._watched_ranks = (
            range(1, comm.size) if comm.rank == 0 else (0,) if comm.rank == 1 else ()
        )
        self._last_seen: dict[
            int, tuple[str, float]
        ] = {}  # rank -> what its file held, and since when
        self._last_sign_time, self._sign_number = time.monotonic(), 0
        # what the files of ranks that all wait held, since when
        self._waiting_since: tuple[list[str], float] = [], self._last_sign_time

    def silent_ranks(self) -> list[tuple[int, str]]:
        """The ranks whose files no longer change, and where they were; gives a sign of one's own
        when it is time.
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
        sign = f"{self._sign_number} {heartbeat.beats} {'waits' if heartbeat.is_waiting else 'works'} {heartbeat}"
        with nolinks.open_folder(self._folder, run, create=True):
            write_atomic(self._folder / str(self._comm.rank), sign.encode(), run)
        return [silent for rank in self._watched_ranks if (silent := self._check_rank(rank, now))]

    def deadlock_stage(self) -> str:
        """Where this rank is, when it and all others have waited without a move for longer than the
        timeout; else "".

        A message that takes so long looks the same. Every rank looks for itself, for none can tell
        another.
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
        """No more signs: the rank leaves in good order."""
        with suppress(OSError):
            # the folder by the last
            nolinks.clear_folder(self._folder, str(self._comm.rank).__eq__, self._folder.parent)

    def _check_rank(self, rank: int, now: float) -> tuple[int, str] | None:
        text = self._read_sign(rank)
        old_text, since = self._last_seen.setdefault(rank, (text, now))
        if text != old_text:
            self._last_seen[rank] = text, now
            return None
        is_silent = now - since > self._timeout and rank in self._comm.heartbeat.members
        return (rank, text.split(" ", 3)[3]) if is_silent else None

    def _read_sign(self, rank: int) -> str:
        """What a rank's file holds."""
        with (
            suppress(OSError, StoreError),
            open_for_reading(self._folder / str(rank), self._folder.parent) as file,
        ):
            return file.read(1000).decode()
        return "0 0 works the set-up"
