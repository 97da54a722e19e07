"""A thread that ends a run whose process no longer gets on, and says where it was."""

import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .comm import Comm


@contextmanager
def watching(comm: Comm, timeout: float, way_out: str) -> Iterator[None]:
    """Inside, ``timeout`` seconds without a beat of ``comm.pulse`` end all ranks; 0: none do.

    The end names rank, round and stage and shows the stack of every thread. Where even this thread cannot run, because
    some library keeps Python's lock, the stacks alone are shown, a quarter of the time later. way_out: the last words.
    """
    if not timeout:
        yield
        return
    over = threading.Event()
    guard = threading.Thread(target=_watch, args=(comm, timeout, way_out, over.wait), daemon=True, name="watchdog")
    guard.start()
    try:
        yield
    finally:
        over.set()
        guard.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(comm: Comm, timeout: float, way_out: str, over: Callable[[float], bool]) -> None:
    """Look at the pulse until it is ``over``."""
    while not over(min(timeout / 8, 5.0)):
        faulthandler.dump_traceback_later(1.25 * timeout, exit=True, file=sys.__stderr__)
        if comm.pulse.still() > timeout:
            end(comm, f"no progress for {timeout:g} s (faults.timeout) in {comm.pulse}", way_out)


def end(comm: Comm, what: str, way_out: str) -> None:
    """End all ranks with the stacks of this one."""
    print(f"\nfedlora-mpi: rank {comm.rank} of {comm.size}: {what}; {way_out}", file=sys.__stderr__, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, 10)  # SIGALRM ends the process where the lock of MPI is not to be had
    comm.abort()
