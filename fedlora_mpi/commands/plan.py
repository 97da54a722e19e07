"""``fedlora-mpi plan CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments, tell_resets

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan``."""
    add_config_argument(parser)
    add_override_arguments(parser)
    parser.add_argument(
        "--ranks", type=int, default=1, help="how many ranks mpirun would start (default 1)"
    )
    parser.add_argument(
        "--gpus",
        metavar="NAME|none",
        help="elsewhere: a GPU for each worker, such as h200, or a core like these",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="BYTES/S",
        help="of a message there (default 12.5e9 with --gpus)",
    )
    parser.add_argument(
        "--latency",
        type=float,
        metavar="SECONDS",
        help="of a message there (default 5e-6 with --gpus)",
    )


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Print the cost of a config."""
    from ..config import read
    from ..core.escapes import escape_lines
    from ..mpi.ending import collectively
    from ..plan import plan

    def plan_and_tell() -> str:
        config = read(args.config, args.overrides)
        text = plan(config, args.config, args.ranks, args.gpus, args.bandwidth, args.latency)
        tell_resets(config)
        return text

    print(escape_lines(collectively(comm, plan_and_tell)))
    return 0


COMMAND = Command(
    "Parameters, bytes, memory and time of a config; trains nothing.", add_arguments, execute
)
