"""What a check is asked and what it answers; a command with a time limit."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple


class Finding(NamedTuple):
    """level: ok, warning (something will not work that may not be needed) or failure."""

    level: str
    text: str
    remedy: str = ""


class Setup(NamedTuple):
    """What is examined: the ``folder`` that a run writes to, and the config ``source``, "" without
    one.
    """

    folder: str
    source: str = ""
    overrides: Sequence[str] = ()
    threads: int = 1
    device: str = "auto"


class Check(NamedTuple):
    """remedy: where the check itself ends with an error; limit: seconds."""

    run: Callable[[Setup], Finding]
    remedy: str
    limit: float = 60


def run_command(command: Sequence[str], limit: float, **env: str) -> tuple[int | None, str, str]:
    """(exit code, output, errors) of a command; no exit code when its time was over. It leaves
    nothing behind.
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
