"""Start this program again on several ranks of this machine, and pass signals on to them."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral

from .launch import launch_command

# A user's own setting wins. Other MPI libraries ignore these names.
_OPEN_MPI_SETTINGS = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # the same for Open MPI 4
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}
_ROOT_SETTINGS = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
INTERRUPTED_EXIT = 130  # the code that shells report after Ctrl-C
STOPPING = (
    "stopping at the end of this round, with a checkpoint; a second Ctrl-C stops at once and "
    "loses the rounds since the last checkpoint"
)


def check_ranks(ranks: int, launched_ranks: int | None) -> None:
    """Raise ValueError unless ``--ranks`` can be obeyed.

    launched_ranks: how many ranks a launcher has started already; None: there is none.
    """
    if not isinstance(ranks, Integral) or ranks < 1:
        raise ValueError(f"--ranks = {ranks!r}: must be an integer of at least 1")
    if launched_ranks is not None and ranks != launched_ranks:
        raise ValueError(
            f"--ranks = {ranks}: a launcher has started {launched_ranks} already; leave out "
            "--ranks, or the launcher"
        )


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a launcher: any number of ranks, unbound, also as root.

    Variables of an MPI job that has ended are left out: with them Open MPI may crash.
    """
    settings = _OPEN_MPI_SETTINGS | (_ROOT_SETTINGS if os.geteuid() == 0 else {})
    kept = {name: value for name, value in environment.items() if not name.startswith("PMIX_")}
    return settings | kept


def run_ranks(
    ranks: int,
    arguments: Sequence[str],
    is_tolerant: bool,
    write: Callable[[str], object] | None = None,
) -> int:
    """Run the command ``arguments`` on several ranks, wait for them, and return the exit code.

    write: gets what they print, line by line; None: they print it to the streams of this process.
    The first Ctrl-C asks the ranks to stop at the end of a round, the second ends them at once.
    Raises ValueError if there is no launcher.
    """
    command = [*launch_command(ranks, is_tolerant), *arguments]
    sys.stdout.flush()
    # In a process group of its own: a terminal sends Ctrl-C to this process alone. Such a group
    # must not read from the terminal, and no rank does.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=launch_environment(os.environ),
        process_group=0,
        stdout=None if write is None else subprocess.PIPE,
        stderr=None if write is None else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    interrupts: list[int] = []
    try:
        with _pass_signals_on(process, interrupts):
            if write is not None and process.stdout is not None:
                for line in process.stdout:
                    write(line)
            code = process.wait()
    except BaseException:
        process.terminate()
        raise
    finally:
        if process.stdout:
            process.stdout.close()
    return INTERRUPTED_EXIT if len(interrupts) > 1 else code if code >= 0 else 128 - code


@contextmanager
def _pass_signals_on(process: subprocess.Popen, interrupts: list[int]) -> Iterator[None]:
    """Inside, the launcher gets the signals of this process; ``interrupts`` collects Ctrl-C."""

    def send(number: int) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(number)

    def interrupt(number, frame) -> None:
        interrupts.append(number)
        if len(interrupts) == 1:
            os.write(2, f"fedlora-mpi: {STOPPING}\n".encode())
        send(signal.SIGUSR1 if len(interrupts) == 1 else signal.SIGTERM)

    handlers = {
        signal.SIGUSR1: lambda number, frame: send(signal.SIGUSR1),
        signal.SIGTERM: lambda number, frame: send(signal.SIGTERM),
        signal.SIGHUP: lambda number, frame: send(signal.SIGTERM),
        signal.SIGINT: interrupt,
    }
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in ``nohup`` and ``&``
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)
