"""How processes are launched: by which launcher this one was, and commands that start others."""

import faulthandler
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# each holds the number of ranks
_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SIZE_VARIABLES = (*_LAUNCHER_VARIABLES, "SLURM_NTASKS")
_LAUNCHER_PROGRAMS = ("prterun", "mpirun", "orterun", "mpiexec", "mpiexec.hydra")


def is_launched() -> bool:
    """Return whether an MPI launcher that is still running has started this process."""
    environment = os.environ
    if any(name in environment for name in _LAUNCHER_VARIABLES):
        return True
    return "PMIX_RANK" in environment and not has_leftovers()


def has_leftovers() -> bool:
    """Return whether the PMIx variables belong to a job that has ended.

    With such variables Open MPI would crash at the end of this process.
    """
    if not any(name in os.environ for name in ("PMIX_RANK", "PMIX_NAMESPACE")):
        return False
    return not any(
        _is_reachable(value)
        for name, value in os.environ.items()
        if name.startswith("PMIX_SERVER_URI")
    )


def _is_reachable(uri: str) -> bool:
    """Return whether the PMIx server of ``NAMESPACE.RANK;tcp4://HOST:PORT`` answers.

    A server with another kind of address counts as reachable.
    """
    kind, _, address = uri.rpartition(";")[2].partition("://")
    host, _, port = address.rpartition(":")
    if not (kind.startswith("tcp") and port.isdecimal()):
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def expected_ranks() -> tuple[int, str]:
    """Return how many processes were started together, and the variable that says so.

    Returns (1, "") when there is no such variable.
    """
    rank_counts = [
        (int(value), name)
        for name in _SIZE_VARIABLES
        if (value := os.environ.get(name, "")).isdecimal()
    ]
    return max(rank_counts, default=(1, ""))


def launched_rank() -> int:
    """Return the rank of this process by its launcher's variables; 0 if there are none."""
    return int(next(_rank_numbers(), "0"))


def _rank_numbers() -> Iterator[str]:
    names = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    return (value for name in names if (value := os.environ.get(name, "")).isdecimal())


@contextmanager
def limit_startup(seconds: float) -> Iterator[None]:
    """End this process with a message and exit code 1 if the block takes longer; 0 means no limit.

    MPI starts inside the block. It waits for every rank, even for a dead one, and holds Python's
    lock (GIL), so no Python code of this process can run. Therefore a child process prints the
    message, and a thread of faulthandler, which does not need the lock, exits. (If the child killed
    this process, mpirun would report success when it tolerates dead ranks.)
    """
    if not seconds:
        yield
        return
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        _report_unless_closed(read_end, seconds)
    os.close(read_end)
    try:
        with open(os.devnull, "w") as nowhere:
            faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(write_end)
        os.waitpid(child, 0)


def _report_unless_closed(pipe: int, seconds: float) -> None:
    """Print a message if the parent does not close the pipe within ``seconds``. Never returns."""
    try:
        if not select.select([pipe], [], [], seconds)[0]:
            rank = next(_rank_numbers(), "?")
            line = (
                f"fedlora-mpi: rank {rank}: MPI has not started within {seconds:g} s "
                "(faults.timeout): a rank has died or is "
            )
            os.write(2, f"{line}out of reach; start again\n".encode())
    finally:
        os._exit(0)


def end_launcher(seconds: float) -> None:
    """Start a child that ends the mpirun of this process, unless it ends itself within ``seconds``.

    mpirun waits for the daemons of all nodes, even for one behind a broken link, whatever its ranks
    ask for.
    """
    launcher = os.getppid()
    start_time = _start_time(launcher)
    if _program_name(launcher) not in _LAUNCHER_PROGRAMS or os.fork() > 0:
        return
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        for _ in range(3):  # mpirun ends at once only on the second signal
            time.sleep(seconds)
            if _start_time(launcher) != start_time:
                break
            os.kill(launcher, signal.SIGTERM)
    finally:
        os._exit(0)


def _program_name(process: int) -> str:
    """Return the program name of a process from ``/proc``, or "" if it is unknown."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _start_time(process: int) -> str:
    """Return the start time of a process, or "" if it has ended.

    It distinguishes the process from a later one with the same number.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def find_mpirun() -> str | None:
    """Return the launcher beside this Python, else the one on PATH, else None."""
    sibling = Path(sys.executable).parent / "mpirun"
    return str(sibling) if sibling.is_file() else shutil.which("mpirun")


def function_command(module: str, name: str) -> list[str]:
    """Return a command line that calls a function of the package.

    Files of the working folder cannot shadow modules that it imports.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    return [
        sys.executable,
        "-P",
        "-c",
        f"import sys; sys.path.append({package_parent!r}); from {module} import {name}; {name}()",
    ]


def launch_command(ranks: int, is_tolerant: bool = False) -> list[str]:
    """Return the command line up to the subcommand.

    is_tolerant: the launcher lets ranks continue when one dies (``--with-ft ulfm``).

    Raises ValueError when several ranks are requested but there is no mpirun.
    """
    python = [sys.executable, "-m", "fedlora_mpi"]
    if ranks == 1:
        return python
    launcher = find_mpirun()
    if launcher is None:
        raise ValueError(
            f"--ranks = {ranks}: no mpirun beside {sys.executable} or on PATH; use --ranks 1, or "
            "pip install 'fedlora-mpi[mpi]'"
        )
    tolerance = ["--with-ft", "ulfm"] if is_tolerant else []
    return [launcher, *tolerance, "-n", str(ranks), "--bind-to", "none", *python]
