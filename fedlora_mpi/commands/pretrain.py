"""``fedlora-mpi pretrain CONFIG --to FILE.safetensors``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments, as_keywords

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pretrain``."""
    add_config_argument(parser, "; its partition and its algorithm do not matter")
    add_override_arguments(parser)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE.safetensors", help="where the weights go"
    )
    parser.add_argument(
        "--classes", metavar="0-4|0,2,5", help="only samples of these (default: all)"
    )
    parser.add_argument("--epochs", type=int, metavar="E", help="default: train.epochs")
    parser.add_argument(
        "--network", type=int, default=0, metavar="K", help="of model.mix, from 0 (default 0)"
    )


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Train a network on the pooled data."""
    from ..config import read
    from ..experiment.pretrain import pretrain
    from ..mpi.ending import collectively

    options = as_keywords(args, "config", "overrides")
    collectively(
        comm, lambda: pretrain(read(args.config, args.overrides), args.config, comm.size, **options)
    )
    return 0


HELP = "Train a network on all data in one place, into a file for model.weights."
COMMAND = Command(HELP, add_arguments, execute, parallel=True, trains=True)
