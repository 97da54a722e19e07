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
from ..store.files import StoreError, opened_file, write_atomic
from .comm import Comm
from .launch import end_launcher


@contextmanager
def watching(comm: Comm, timeout: float, folder: Path, way_out: str) -> Iterator[None]:
    """Inside, ``timeout`` seconds without a beat of ``comm.pulse`` end all ranks; 0: none do.

    The end names rank, round and stage and shows the stack of every thread. Where even this thread
    cannot run, because some library keeps Python's lock, the stacks alone are shown, a quarter of
    the time later. A process that is stopped as a whole shows nothing: the others miss the signs of
    life that each rank puts into the run ``folder`` (see ``Signs``). By these a rank also sees that
    all wait for each other, because a link is down. way_out: the last words.
    """
    if not timeout:
        yield
        return
    over, signs = threading.Event(), Signs(comm, folder / ".pulse", timeout)
    guard = threading.Thread(
        target=_watch, args=(comm, timeout, signs, way_out, over.wait), daemon=True, name="watchdog"
    )
    guard.start()
    try:
        yield
    finally:
        over.set()
        guard.join()
        faulthandler.cancel_dump_traceback_later()
        signs.remove()


def _watch(
    comm: Comm, timeout: float, signs: "Signs", way_out: str, over: Callable[[float], bool]
) -> None:
    """Look at the pulse until it is ``over``."""
    while not over(min(timeout / 8, 5.0)):
        faulthandler.dump_traceback_later(1.25 * timeout, exit=True, file=sys.__stderr__)
        if comm.pulse.still() > timeout:
            _end(
                comm,
                f"rank {comm.rank} of {comm.size}: no progress",
                timeout,
                str(comm.pulse),
                way_out,
            )
        for rank, text in signs.missed():
            _end(comm, f"rank {rank} of {comm.size}: no sign of life", timeout, text, way_out)
        if text := signs.all_waiting():
            _end(
                comm,
                "all ranks wait for each other: their messages do not get through",
                timeout,
                text,
                way_out,
            )


def _end(comm: Comm, what: str, timeout: float, where: str, way_out: str) -> None:
    """End all ranks with the stacks of this one."""
    with suppress(OSError):  # nobody may read it
        line = f"\nfedlora-mpi: {what} for {timeout:g} s (faults.timeout) in {where}; {way_out}"
        print(line, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__)
    end_launcher(10)
    # SIGALRM ends the process where the lock of MPI is not to be had
    signal.setitimer(signal.ITIMER_REAL, 10)
    comm.abort()


class Signs:
    """Files that change four times in ``timeout`` seconds as long as a rank's process runs at all,
    however long it waits.

    Rank 0 looks at those of all others, rank 1 at rank 0's; clocks are not compared. Short runs
    write none. A file holds a number that changes, how often the rank has moved, whether it waits,
    and where it is.
    """

    def __init__(self, comm: Comm, folder: Path, timeout: float) -> None:
        self._comm, self._folder, self._timeout = comm, folder, timeout
        self._watched = range(1, comm.size) if comm.rank == 0 else (0,) if comm.rank == 1 else ()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> what its file held, and since when
        self._given, self._number = time.monotonic(), 0
        # what the files of ranks that all wait held, since when
        self._stuck: tuple[list[str], float] = [], self._given

    def missed(self) -> list[tuple[int, str]]:
        """The ranks whose files no longer change, and where they were; gives a sign of one's own
        when it is time.
        """
        now = time.monotonic()
        if (
            self._comm.size == 1
            or now - self._given < self._timeout / 4
            or not self._folder.parent.is_dir()
        ):
            return []
        self._given, self._number = now, self._number + 1
        pulse, run = self._comm.pulse, self._folder.parent
        sign = f"{self._number} {pulse.moves} {'waits' if pulse.waits else 'works'} {pulse}"
        with nolinks.opened_folder(self._folder, run, make=True):
            write_atomic(self._folder / str(self._comm.rank), sign.encode(), run)
        return [found for rank in self._watched if (found := self._look(rank, now))]

    def all_waiting(self) -> str:
        """Where this rank is, when it and all others have waited without a move for longer than the
        timeout; else "".

        A message that takes so long looks the same. Every rank looks for itself, for none can tell
        another.
        """
        pulse, now = self._comm.pulse, time.monotonic()
        if self._comm.size == 1 or not pulse.waits:
            self._stuck = [], now
            return ""
        signs = [self._sign(rank).split(" ", 3)[1:3] for rank in pulse.members]
        if signs != self._stuck[0] or not all(sign[1:] == ["waits"] for sign in signs):
            self._stuck = signs, now
        return str(pulse) if now - self._stuck[1] > self._timeout else ""

    def remove(self) -> None:
        """No more signs: the rank leaves in good order."""
        with suppress(OSError):
            # the folder by the last
            nolinks.clear(self._folder, str(self._comm.rank).__eq__, self._folder.parent)

    def _look(self, rank: int, now: float) -> tuple[int, str] | None:
        text = self._sign(rank)
        was, since = self._seen.setdefault(rank, (text, now))
        if text != was:
            self._seen[rank] = text, now
            return None
        silent = now - since > self._timeout and rank in self._comm.pulse.members
        return (rank, text.split(" ", 3)[3]) if silent else None

    def _sign(self, rank: int) -> str:
        """What a rank's file holds."""
        with (
            suppress(OSError, StoreError),
            opened_file(self._folder / str(rank), self._folder.parent) as file,
        ):
            return file.read(1000).decode()
        return "0 0 works the set-up"
