"""The functions of the two ranks that the MPI checks start."""

import json
import os

import numpy as np

from ..mpi.comm import connect, library_version, supports_ulfm


def hello() -> None:
    """Print what one of two ranks sees."""
    comm, ones = connect(), np.ones(1)
    comm.sum(ones)
    seen = {
        "rank": comm.rank,
        "sum": int(ones[0]),
        "cores": _format_span(os.sched_getaffinity(0)),
        "library": library_version(),
    }
    print(json.dumps(seen), flush=True)


def lose_one() -> None:
    """Print "went on" on the rank that continues when the other is killed."""
    if supports_ulfm():
        print("went on", flush=True)
    os._exit(0)  # the rest of the job cannot end normally


def _format_span(cores: set[int]) -> str:
    """Return '0' for one core, '0-3' for the first and last of several."""
    return f"{min(cores)}" if len(cores) == 1 else f"{min(cores)}-{max(cores)}"
