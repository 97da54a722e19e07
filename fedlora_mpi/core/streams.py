"""Keeps a command alive when its standard streams are closed, unread or limited to ASCII."""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGPIPE_EXIT = 141  # a shell's exit code of a command that SIGPIPE ended because its reader left
_ASCII_SIGNS = {
    "·": "|",
    "±": "+-",
    "×": "x",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
}


class OutputError(Exception):
    """Standard output cannot be written. The message is one line."""


def _encode_fallback(error: UnicodeError) -> tuple[str, int]:
    """Replace what a stream cannot encode by a similar sign, or else by its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(
        _ASCII_SIGNS.get(s) or s.encode("ascii", "backslashreplace").decode() for s in signs
    ), error.end


@contextmanager
def repair_streams() -> Iterator[None]:
    """Inside, the three standard streams are open and print any text.

    Raises BrokenPipeError if the reader of the output has left (``report | head -1``), and
    OutputError if the output goes to a full disk. In both cases no output remains to be flushed.
    """
    codecs.register_error("fedlora_mpi", _encode_fallback)
    _reopen_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fedlora_mpi")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            _redirect_to_null(stream)
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        _redirect_to_null(sys.stdout)
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


@contextmanager
def tolerate_output_errors() -> Iterator[None]:
    """Inside, a line that cannot be printed is lost and training goes on."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_TolerantStream, streams)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = streams


class _TolerantStream:
    """A stream that is redirected to the null device once its file cannot be written."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        _redirect_to_null(self._stream)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            return self._stream.flush()
        _redirect_to_null(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _reopen_closed() -> None:
    """Open the null device in place of each closed standard stream.

    Otherwise the next file that is opened would get the stream's number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            # stays open until the process ends
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _redirect_to_null(stream) -> None:
    """Send a stream's buffer and all further output to the null device."""
    with suppress(OSError, ValueError):  # a test's stream has no file number
        handle = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(handle, stream.fileno())
        finally:
            os.close(handle)
        stream.flush()
