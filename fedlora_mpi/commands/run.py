"""``fedlora-mpi run CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import (
    Command,
    add_config_argument,
    add_override_arguments,
    add_quiet_argument,
    add_ranks_argument,
    as_keywords,
)

if TYPE_CHECKING:
    from ..api.task import NewRun
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
    add_quiet_argument(parser)
    add_override_arguments(parser)


def _task(args: argparse.Namespace) -> "NewRun":
    from ..api.task import NewRun

    return NewRun(**as_keywords(args, "ranks"))


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Train from a config."""
    from ..api.task import check_ranks

    check_ranks(args.ranks, comm)
    return _task(args).train(comm)


def launch(args: argparse.Namespace) -> int:
    """Train on several ranks of this machine."""
    from ..api.task import train_on_ranks

    return train_on_ranks(_task(args), args.ranks)


COMMAND = Command(
    "Train from a config into a new run folder.",
    add_arguments,
    execute,
    parallel=True,
    trains=True,
    launch=launch,
)
