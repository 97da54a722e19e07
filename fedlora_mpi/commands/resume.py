"""``fedlora-mpi resume RUN``."""

import argparse
from typing import TYPE_CHECKING

from .command import (
    Command,
    add_override_arguments,
    add_quiet_argument,
    add_ranks_argument,
    add_run_argument,
)

if TYPE_CHECKING:
    from ..api.task import ResumedRun
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``resume``."""
    add_run_argument(parser)
    add_ranks_argument(parser)
    add_quiet_argument(parser)
    add_override_arguments(parser)


def _task(args: argparse.Namespace) -> "ResumedRun":
    from ..api.task import ResumedRun

    return ResumedRun(args.run, args.overrides, args.quiet)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Continue a run."""
    from ..api.task import check_ranks

    check_ranks(args.ranks, comm)
    return _task(args).train(comm)


def launch(args: argparse.Namespace) -> int:
    """Continue a run on several ranks of this machine."""
    from ..api.task import train_on_ranks

    return train_on_ranks(_task(args), args.ranks)


COMMAND = Command(
    "Continue a run from its newest valid checkpoint.",
    add_arguments,
    execute,
    parallel=True,
    trains=True,
    launch=launch,
)
