"""``fedlora-mpi status CONFIG|RUN``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_override_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``status``."""
    target_help = "a YAML file, whose output is asked for, or a run folder"
    parser.add_argument("target", type=Path, metavar="CONFIG|RUN", help=target_help)
    add_override_arguments(parser)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Print whether a run is done."""
    from ..analysis.status import run_progress
    from ..core.escapes import escape_line
    from ..experiment.loop import STOPPED_EXIT
    from ..mpi.ending import collectively

    folder, saved, rounds = collectively(comm, lambda: run_progress(args.target, args.overrides))
    print(escape_line(f"{folder}: {'done' if saved >= rounds else f'{saved} of {rounds} rounds'}"))
    return 0 if saved >= rounds else STOPPED_EXIT


COMMAND = Command(
    "Whether a run is done: exit code 0, or 75 where rounds are left. For scripts.",
    add_arguments,
    execute,
)
