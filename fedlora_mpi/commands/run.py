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
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on with the run folder if it is there"
    )
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run folder if it is there and holds nothing but a run",
    )
    add_ranks_argument(parser)
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Train from a config."""
    from .. import config
    from ..experiment import loop

    check_ranks(args, comm)
    settings, comm = loop.receive_config(comm, lambda: config.read(args.config, args.overrides))
    if args.resume:
        return loop.start_or_resume(settings, args.config, comm)
    return loop.start(settings, args.config, comm, args.overwrite)


def launch(args: argparse.Namespace) -> int:
    """Train on several ranks of this machine."""
    from .. import config
    from ..core.paths import expand_home

    settings = read_or_refuse(args, lambda: config.read(args.config, args.overrides))
    flags = [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)]
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
