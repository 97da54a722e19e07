"""``fedlora-mpi digest RUN ...``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_run_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Print a checksum of the newest valid checkpoint of each run."""
    from ..mpi.ending import collectively

    collectively(comm, lambda: _print_digests(args))
    return 0


def _print_digests(args: argparse.Namespace) -> None:
    from ..core.escapes import escape_line
    from ..store.reader import RunFiles

    for folder in args.runs:
        checkpoint = RunFiles(folder).checkpoint()
        sums = checkpoint.digest()
        print(
            f"{escape_line(folder)} round {checkpoint.round} shared {sums['shared']} personal "
            f"{sums['personal']}",
            flush=True,
        )


COMMAND = Command(
    "SHA-256 of the newest checkpoint of runs: equal means equal to the bit.",
    add_run_arguments,
    execute,
    imports=False,
)
