"""How ranks end: each by itself when all reach the same error, or all at once when one fails."""

import errno
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np

from ..core.disk_errors import WriteError
from ..core.escapes import escape_line
from ..core.paths import describe_path_error, is_path_error
from .comm import Comm
from .local_ranks import INTERRUPTED_EXIT
from .pending import RankLost

T = TypeVar("T")
_REFUSAL, _FAULT = 1, 2  # a rank's error code; 0: no error
_MAX_TEXT = 2000  # bytes of an error message that are sent


class CollectiveExit(Exception):
    """An error that every rank reaches at the same point, so that each can exit by itself.

    ``reporting_rank`` prints it.
    """

    code = 1

    def __init__(self, text: str, reporting_rank: int = 0) -> None:
        super().__init__(text)
        self.reporting_rank = reporting_rank


class Refusal(CollectiveExit):
    """A mistake of the user."""

    code = 2


class Fault(CollectiveExit):
    """An error that no check of the config could find, such as a loss that is not finite."""


class ServerLost(Fault):
    """Rank 0 has died."""


def collectively(comm: Comm, stage: Callable[[], T]) -> T:
    """Run ``stage`` on every rank and continue only if it succeeds on all.

    A user's mistake (ValueError) on any rank raises Refusal on all, with the text of the lowest
    such rank, so that no rank waits for one that has left. A full disk (WriteError) raises Fault on
    all.
    """
    result, text, error_code = None, b"", 0
    try:
        result = stage()
    except (ValueError, WriteError) as error:
        text = _encode(str(error))
        error_code = _REFUSAL if isinstance(error, ValueError) else _FAULT
    except OSError as error:
        if not is_path_error(error):
            raise
        text, error_code = _encode(describe_path_error(error)), _REFUSAL
    table = np.zeros((comm.size, _MAX_TEXT + 1), np.uint8)
    table[comm.rank, : len(text)] = np.frombuffer(text, np.uint8)
    table[comm.rank, _MAX_TEXT] = error_code
    comm.sum(table)  # each row is set by one rank
    failed = np.flatnonzero(table[:, _MAX_TEXT])
    if failed.size:
        message = table[failed[0], :_MAX_TEXT].tobytes().rstrip(b"\0").decode(errors="replace")
        if table[failed[0], _MAX_TEXT] == _REFUSAL:
            raise Refusal(message)
        raise Fault(message)
    return cast(T, result)  # None only if ``stage`` returned it


def _encode(text: str) -> bytes:
    """Return a message as bytes. What is not Unicode, such as parts of a file name, is escaped."""
    return text.encode(errors="backslashreplace")[:_MAX_TEXT]


def run_or_abort(comm: Comm, main: Callable[[], int]) -> int:
    """Return the exit code of ``main``.

    An exception on this rank alone ends ALL ranks and prints its traceback. Otherwise the others
    would wait for this rank for ever.
    """
    try:
        return main()
    except CollectiveExit as end:
        if comm.rank == end.reporting_rank:
            print(_error_line(end), file=sys.stderr, flush=True)
        return end.code
    except KeyboardInterrupt:  # the last checkpoint stays intact
        if comm.size > 1:
            comm.abort()  # the others would wait for this rank
        return INTERRUPTED_EXIT
    except RankLost as lost:
        print(_error_line(lost), file=sys.stderr, flush=True)
        comm.abort()
    except WriteError as error:
        print(_error_line(error), file=sys.stderr, flush=True)
        comm.abort()
    except BrokenPipeError:
        raise  # the reader of the output has gone, which is no error
    except OSError as error:
        if comm.size == 1 and error.filename is None and error.errno == errno.ENOSPC:
            raise  # standard output is on a full disk
        return _stop_all_ranks(comm)
    except Exception:
        return _stop_all_ranks(comm)
    return 1


def _stop_all_ranks(comm: Comm) -> int:
    """Print the traceback of the current exception and end all ranks."""
    print(f"[rank {comm.rank} of {comm.size}] stopped all ranks:", file=sys.stderr)
    traceback.print_exc()
    if comm.size > 1:
        comm.abort()
    return 1


def _error_line(error: Exception) -> str:
    """Return one line with the exception and its notes."""
    return escape_line("; ".join([f"fedlora-mpi: {error}", *getattr(error, "__notes__", ())]))
