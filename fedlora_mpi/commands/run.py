"""``fedlora-mpi run CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments, add_ranks_argument
from .launching import check_ranks, launch_training, read_or_refuse

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    add_config_argument(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run folder if it is there"
    )
    add_ranks_argument(parser)
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Train from a config."""
    from .. import config
    from ..run import loop

    check_ranks(args, comm)
    train = loop.start_or_resume if args.resume else loop.start
    settings, comm = loop.receive_config(comm, lambda: config.read(args.config, args.overrides))
    return train(settings, args.config, comm)


def launch(args: argparse.Namespace) -> int:
    """Train on several ranks of this machine."""
    from .. import config
    from ..core.paths import expand_home

    settings = read_or_refuse(args, lambda: config.read(args.config, args.overrides))
    flags = ["--resume"] if args.resume else []
    arguments = ["run", *flags, "--ranks", str(args.ranks), "--", args.config, *args.overrides]
    return launch_training(args, arguments, settings, expand_home(settings.output))


COMMAND = Command(
    "Train from a config into a new run folder.",
    add_arguments,
    execute,
    parallel=True,
    trains=True,
    launch=launch,
)
