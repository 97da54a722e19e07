"""``fedlora-mpi check MODULE:CLASS [KEY=VALUE ...]``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_override_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``check``."""
    parser.add_argument(
        "method", metavar="MODULE:CLASS", help="the class of a method, such as my_module:Mine"
    )
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Check a user's method."""
    from ..doctor.method_check import check_method

    return check_method(args.method, args.overrides)


COMMAND = Command(
    "Whether a method of your own is right, a line each with the mistake.", add_arguments, execute
)
