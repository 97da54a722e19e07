"""``fedlora-mpi run CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    add_config_argument(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run folder if it is there"
    )
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Train from a config."""
    from .. import config
    from ..run import loop

    train = loop.start_or_resume if args.resume else loop.start
    settings, comm = loop.receive_config(comm, lambda: config.read(args.config, args.overrides))
    return train(settings, args.config, comm)


COMMAND = Command(
    "Train from a config into a new run folder.", add_arguments, execute, parallel=True, trains=True
)
