"""How ranks end: together by a refusal or a fault that all of them reach, or all of them at once by
the fault of one.
"""

import errno
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ..core.disk_errors import Unwritable
from ..core.escapes import one_line
from ..core.paths import describe, is_mistake
from .comm import Comm
from .pending import Lost

T = TypeVar("T")
_TEXT = 2000  # bytes of an error message that travel


class Everywhere(Exception):
    """An end that every rank reaches at the same point, so each can leave by itself; ``speaker``
    tells of it.
    """

    code = 1

    def __init__(self, text: str, speaker: int = 0) -> None:
        super().__init__(text)
        self.speaker = speaker


class Refused(Everywhere):
    """The user's mistake."""

    code = 2


class Fault(Everywhere):
    """Something that no configuration check could see, for instance a loss that is not finite."""


class Orphaned(Fault):
    """Rank 0 has died."""


def together(comm: Comm, stage: Callable[[], T]) -> T:
    """Run ``stage`` on every rank and go on only if it succeeds on all.

    A user's mistake (ValueError) on any rank raises Refused on all, with the text of the lowest
    such rank: no rank waits for one that has left. So does a full disk (Unwritable) raise Fault.
    """
    result, text, end = None, b"", 0
    try:
        result = stage()
    except (ValueError, Unwritable) as error:
        text, end = _bytes(str(error)), 1 + (not isinstance(error, ValueError))
    except OSError as error:
        if not is_mistake(error):
            raise
        text, end = _bytes(describe(error)), 1
    table = np.zeros((comm.size, _TEXT + 1), np.uint8)
    table[comm.rank, : len(text)] = np.frombuffer(text, np.uint8)
    table[comm.rank, _TEXT] = end
    comm.sum(table)  # each row is set by one rank
    failed = np.flatnonzero(table[:, _TEXT])
    if failed.size:
        said = table[failed[0], :_TEXT].tobytes().rstrip(b"\0").decode(errors="replace")
        raise (Refused, Fault)[table[failed[0], _TEXT] - 1](said)
    return result


def _bytes(text: str) -> bytes:
    """A message that travels; what is no Unicode in it, such as parts of a file name, is escaped."""
    return text.encode(errors="backslashreplace")[:_TEXT]


def guarded(comm: Comm, main: Callable[[], int]) -> int:
    """The exit code of ``main``. An exception that only this rank met ends ALL ranks, with its
    traceback: the others would otherwise wait for this one for ever."""
    try:
        return main()
    except Everywhere as end:
        if comm.rank == end.speaker:
            print(_said(end), file=sys.stderr, flush=True)
        return end.code
    except KeyboardInterrupt:
        return 130  # as a shell reports it; what the last checkpoint holds is safe
    except Lost as lost:
        print(_said(lost), file=sys.stderr, flush=True)
        comm.abort()
    except Unwritable as error:
        print(_said(error), file=sys.stderr, flush=True)
        comm.abort()
    except BrokenPipeError:
        raise  # nobody reads the output, which is no fault
    except OSError as error:
        if comm.size == 1 and error.filename is None and error.errno == errno.ENOSPC:
            raise  # nor is a full disk behind it
        return _stopped(comm)
    except Exception:
        return _stopped(comm)
    return 1


def _stopped(comm: Comm) -> int:
    """Show the exception at hand, and end all ranks."""
    print(f"[rank {comm.rank} of {comm.size}] stopped all ranks:", file=sys.stderr)
    traceback.print_exc()
    if comm.size > 1:
        comm.abort()
    return 1


def _said(error: Exception) -> str:
    """One line, with the way out where one was noted."""
    return one_line("; ".join([f"fedlora-mpi: {error}", *getattr(error, "__notes__", ())]))
