"""``fedlora-mpi resume RUN``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_override_arguments, add_ranks_argument, add_run_argument
from .launching import check_ranks, launch_training, read_or_refuse

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``resume``."""
    add_run_argument(parser)
    add_ranks_argument(parser)
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Continue a run."""
    from ..experiment.loop import resume

    check_ranks(args, comm)
    return resume(args.run, args.overrides, comm)


def launch(args: argparse.Namespace) -> int:
    """Continue a run on several ranks of this machine."""
    from ..experiment.output import config_to_resume

    settings = read_or_refuse(args, lambda: config_to_resume(args.run, args.overrides))
    arguments = ["resume", "--ranks", str(args.ranks), "--", str(args.run), *args.overrides]
    return launch_training(args, arguments, settings, args.run)


COMMAND = Command(
    "Continue a run from its newest valid checkpoint.",
    add_arguments,
    execute,
    parallel=True,
    trains=True,
    launch=launch,
)
