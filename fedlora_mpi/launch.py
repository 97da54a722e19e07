"""How the package is started in processes of its own."""

import shutil
import sys
from pathlib import Path


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
