"""``fedlora-mpi doctor [CONFIG|RUN]``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_override_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``doctor``."""
    parser.add_argument(
        "target", nargs="?", type=Path, metavar="CONFIG|RUN", help="default: this folder"
    )
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Check this machine."""
    from ..doctor.examination import examine
    from ..mpi.ending import collectively
    from ..mpi.launch import launched_rank

    if launched_rank():  # every rank would print the same
        return 0
    return collectively(comm, lambda: examine(args.target, args.overrides))


COMMAND = Command(
    "Whether everything works on this machine, a line each with the remedy.", add_arguments, execute
)
