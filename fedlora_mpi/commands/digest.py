"""``fedlora-mpi digest RUN ...``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_runs

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def execute(asked: argparse.Namespace, comm: "Comm") -> int:
    """Print a checksum of what each run has learned."""
    from ..mpi.ending import collectively

    collectively(comm, lambda: _show(asked))
    return 0


def _show(asked: argparse.Namespace) -> None:
    from ..core.escapes import escape_line
    from ..store.reader import RunFiles

    for folder in asked.runs:
        checkpoint = RunFiles(folder).checkpoint()
        sums = checkpoint.digest()
        print(
            f"{escape_line(folder)} round {checkpoint.round} shared {sums['shared']} personal "
            f"{sums['personal']}",
            flush=True,
        )


COMMAND = Command(
    "SHA-256 of the newest checkpoint of runs: equal means equal to the bit.",
    add_runs,
    execute,
    imports=False,
)
