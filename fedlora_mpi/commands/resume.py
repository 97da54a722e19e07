"""``fedlora-mpi resume RUN``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_override_arguments, add_run_argument

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``resume``."""
    add_run_argument(parser)
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Continue a run."""
    from ..run.loop import resume

    return resume(args.run, args.overrides, comm)


COMMAND = Command(
    "Continue a run from its newest valid checkpoint.",
    add_arguments,
    execute,
    parallel=True,
    trains=True,
)
