"""``fedlora-mpi run CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config, add_overrides

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``run``."""
    add_config(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run folder if it is there"
    )
    add_overrides(parser)


def execute(asked: argparse.Namespace, comm: "Comm") -> int:
    """Train from a config."""
    from .. import config
    from ..run import loop

    begin = loop.start_or_resume if asked.resume else loop.start
    settings, comm = loop.receive(comm, lambda: config.read(asked.config, asked.overrides))
    return begin(settings, asked.config, comm)


COMMAND = Command(
    "Train from a config into a new run folder.", add_arguments, execute, parallel=True, trains=True
)
