"""How the package is started: in processes of its own, and by which launcher this process was."""

import os
import shutil
import sys
from pathlib import Path


_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # each has the number of ranks
_SIZES = (*_LAUNCHERS, "SLURM_NTASKS")


def is_launched() -> bool:
    """Whether an MPI launcher that is still there has started this process."""
    environment = os.environ
    if any(name in environment for name in _LAUNCHERS):
        return True
    return "PMIX_RANK" in environment and not has_leftovers()


def has_leftovers() -> bool:
    """Whether PMIx variables are of a job that has ended: Open MPI would crash at the end of this process."""
    server = os.environ.get("PMIX_SERVER_TMPDIR")
    alive = "SLURM_STEP_ID" in os.environ or server is not None and Path(server).is_dir()
    return not alive and any(name in os.environ for name in ("PMIX_RANK", "PMIX_NAMESPACE"))


def expected_ranks() -> tuple[int, str]:
    """How many processes were started together, and the variable that says so; (1, "") when none does."""
    given = [(int(value), name) for name in _SIZES if (value := os.environ.get(name, "")).isdecimal()]
    return max(given, default=(1, ""))


def mpirun() -> str | None:
    """The launcher beside this Python, else the one on PATH; None where there is neither."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.is_file() else shutil.which("mpirun")


def function(module: str, name: str) -> list[str]:
    """The command line that calls a function of the package, with no file of the working folder in the way."""
    home = str(Path(__file__).resolve().parents[1])
    return [sys.executable, "-P", "-c", f"import sys; sys.path.append({home!r}); from {module} import {name}; {name}()"]


def command(ranks: int) -> list[str]:
    """The command line up to the subcommand. Raises ValueError where there is no mpirun for several ranks."""
    python = [sys.executable, "-m", "fedlora_mpi"]
    if ranks == 1:
        return python
    launcher = mpirun()
    if launcher is None:
        raise ValueError(f"--ranks = {ranks}: no mpirun beside {sys.executable} or on PATH; use --ranks 1")
    return [launcher, "-n", str(ranks), "--bind-to", "none", *python]
