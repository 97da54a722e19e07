"""``fedlora-mpi sweep CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, as_keywords

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sweep``."""
    add_config_argument(parser)
    axes_help = (
        "a key with several values: train.lr=0.01,0.1, seed='range(1,4)', "
        "algorithm='choice(fedavg,local)'; or with one, as for run; output=FOLDER is the folder of "
        "the sweep"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUES", help=axes_help)
    parser.add_argument(
        "--jobs", type=int, metavar="J", help="runs at a time (default: one per core, or per GPU)"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="R", help="MPI processes of a run (default 1)"
    )
    parser.add_argument(
        "--print-jobs", action="store_true", help="run nothing; a line for each run that is left"
    )


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Carry out the runs of a sweep that are not done."""
    from ..mpi.ending import collectively
    from ..sweeps.sweep import Request, execute

    return collectively(comm, lambda: execute(Request(**as_keywords(args))))


COMMAND = Command(
    "Train every combination of several values; the same command again goes on.",
    add_arguments,
    execute,
    trains=True,
)
