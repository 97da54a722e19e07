"""``fedlora-mpi submit CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments, as_keywords, tell_resets

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``submit``."""
    add_config_argument(parser)
    add_override_arguments(parser)
    ranks_help = "of the job (default: server and a worker per GPU; 9 on a node without)"
    parser.add_argument("--ranks", type=int, help=ranks_help)
    add_slurm_arguments(parser)


def add_slurm_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the arguments that say what a job requests from Slurm."""
    parser.add_argument("--nodes", type=int, help="default 1")
    parser.add_argument("--gpus", type=int, metavar="G", help="per node (default 0)")
    parser.add_argument(
        "--time", metavar="HH:MM:SS", help="until it is queued again (default 12:00:00)"
    )
    parser.add_argument("--partition", help="default: the cluster's")
    parser.add_argument("--account", help="default: yours")
    parser.add_argument(
        "--mem", metavar="SIZE", help="per node, such as 64G (default: the cluster's)"
    )
    parser.add_argument("--qos", help="default: yours")
    parser.add_argument(
        "--constraint", metavar="FEATURES", help="of the nodes, such as 'a100|h100'"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Queue a run."""
    from ..config import read
    from ..experiment.slurm import submit
    from ..mpi.ending import collectively

    def queue() -> str:
        config = read(args.config, args.overrides)  # a mistake shows now, not in the job
        text = submit(config, args.config, **as_keywords(args, "config"))
        tell_resets(config)
        return text

    print(collectively(comm, queue))
    return 0


COMMAND = Command(
    "Queue a run as a Slurm job, which is queued again until the run is done.",
    add_arguments,
    execute,
)
