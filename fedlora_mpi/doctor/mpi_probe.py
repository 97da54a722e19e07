"""What the two ranks do that the checks of MPI start."""

import json
import os

import numpy as np

from ..mpi.comm import connect, library_version, supports_ulfm


def hello() -> None:
    """One of two ranks: what it sees."""
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
    """One of two ranks, of which one dies."""
    if supports_ulfm():
        print("went on", flush=True)
    os._exit(0)  # what is left of the job has no way to end in good order


def _format_span(cores: set[int]) -> str:
    """'0', or '0-3' for the first and last of several."""
    return f"{min(cores)}" if len(cores) == 1 else f"{min(cores)}-{max(cores)}"
