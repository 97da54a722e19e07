"""The input and the result of a check, and a command with a time limit."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple


class Finding(NamedTuple):
    """The result of a check.

    level: ok, failure, or warning (something does not work, but may not be needed).
    """

    level: str
    text: str
    remedy: str = ""


class Setup(NamedTuple):
    """What to examine: the run folder ``folder`` and the config ``source``, "" if none."""

    folder: str
    source: str = ""
    overrides: Sequence[str] = ()
    threads: int = 1
    device: str = "auto"
    need: int | None = None  # bytes that the run takes on disk; None: unknown


class Check(NamedTuple):
    """A check. remedy: for the case that the check itself raises; limit: seconds."""

    run: Callable[[Setup], Finding]
    remedy: str
    limit: float = 60


def run_command(command: Sequence[str], limit: float, **env: str) -> tuple[int | None, str, str]:
    """Return (exit code, output, errors) of a command. It leaves no process behind.

    The exit code is None if the time limit was exceeded.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | env,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        for signal_number in (signal.SIGTERM, signal.SIGKILL):  # mpirun ends its ranks on the first
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=3)
                break
        return None, "", ""
