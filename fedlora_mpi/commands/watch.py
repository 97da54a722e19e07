"""``fedlora-mpi watch RUN``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_run_argument

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``watch``."""
    add_run_argument(parser)
    parser.add_argument(
        "--every", type=float, default=2, metavar="SECONDS", help="between two looks (default 2)"
    )
    parser.add_argument("--once", action="store_true", help="print it once and leave")


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Show a run while it continues."""
    from ..analysis.watch import watch
    from ..mpi.ending import collectively

    collectively(comm, lambda: watch(args.run, args.every, args.once))
    return 0


HELP = "A run in the terminal while it goes on: curve, time left, load of the ranks."
COMMAND = Command(HELP, add_arguments, execute, imports=False)
