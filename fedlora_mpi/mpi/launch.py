"""How the package is started: in processes of its own, and by which launcher this process was."""

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

# each has the number of ranks
_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SIZE_VARIABLES = (*_LAUNCHER_VARIABLES, "SLURM_NTASKS")
_LAUNCHER_PROGRAMS = ("prterun", "mpirun", "orterun", "mpiexec", "mpiexec.hydra")


def is_launched() -> bool:
    """Whether an MPI launcher that is still there has started this process."""
    environment = os.environ
    if any(name in environment for name in _LAUNCHER_VARIABLES):
        return True
    return "PMIX_RANK" in environment and not has_leftovers()


def has_leftovers() -> bool:
    """Whether PMIx variables are of a job that has ended: Open MPI would crash at the end of this
    process.
    """
    if not any(name in os.environ for name in ("PMIX_RANK", "PMIX_NAMESPACE")):
        return False
    return not any(
        _is_reachable(value)
        for name, value in os.environ.items()
        if name.startswith("PMIX_SERVER_URI")
    )


def _is_reachable(uri: str) -> bool:
    """Whether the PMIx server of ``NAMESPACE.RANK;tcp4://HOST:PORT`` is there; one of another kind
    is taken to be.
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
    """How many processes were started together, and the variable that says so; (1, "") when none
    does.
    """
    rank_counts = [
        (int(value), name)
        for name in _SIZE_VARIABLES
        if (value := os.environ.get(name, "")).isdecimal()
    ]
    return max(rank_counts, default=(1, ""))


@contextmanager
def limit_startup(seconds: float) -> Iterator[None]:
    """End this process, with a line and exit code 1, when the block takes longer; 0: it may take
    for ever.

    MPI starts inside: it waits for every rank, also for one that is dead, and holds Python's lock.
    So no Python of this process could say anything: a child prints the line, and a thread of
    faulthandler, which needs no lock, leaves. (The child could only kill, which mpirun takes for
    success where ranks may die.)
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
    """Wait for the end of a pipe, and say so where the parent does not close it in time. Does not
    return.
    """
    try:
        if not select.select([pipe], [], [], seconds)[0]:
            rank = next(
                (
                    os.environ[name]
                    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
                    if name in os.environ
                ),
                "?",
            )
            line = (
                f"fedlora-mpi: rank {rank}: MPI has not started within {seconds:g} s "
                "(faults.timeout): a rank has died or is "
            )
            os.write(2, f"{line}out of reach; start again\n".encode())
    finally:
        os._exit(0)


def end_launcher(seconds: float) -> None:
    """Let a child end the mpirun that has started this process, unless that ends by itself within
    ``seconds``.

    mpirun waits for the daemons of all nodes, also for one behind a link that is down, whatever its
    ranks ask for.
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
        for _ in range(3):  # the second signal is the one that it takes for urgent
            time.sleep(seconds)
            if _start_time(launcher) != start_time:
                break
            os.kill(launcher, signal.SIGTERM)
    finally:
        os._exit(0)


def _program_name(process: int) -> str:
    """The program of a process, as Linux tells it; "" where it does not."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _start_time(process: int) -> str:
    """What tells a process from a later one with its number; "" where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def find_mpirun() -> str | None:
    """The launcher beside this Python, else the one on PATH; None where there is neither."""
    sibling = Path(sys.executable).parent / "mpirun"
    return str(sibling) if sibling.is_file() else shutil.which("mpirun")


def function_command(module: str, name: str) -> list[str]:
    """The command line that calls a function of the package, with no file of the working folder in
    the way.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    return [
        sys.executable,
        "-P",
        "-c",
        f"import sys; sys.path.append({package_parent!r}); from {module} import {name}; {name}()",
    ]


def launch_command(ranks: int) -> list[str]:
    """The command line up to the subcommand. Raises ValueError where there is no mpirun for several
    ranks.
    """
    python = [sys.executable, "-m", "fedlora_mpi"]
    if ranks == 1:
        return python
    launcher = find_mpirun()
    if launcher is None:
        raise ValueError(
            f"--ranks = {ranks}: no mpirun beside {sys.executable} or on PATH; use --ranks 1"
        )
    return [launcher, "-n", str(ranks), "--bind-to", "none", *python]
