"""``fedlora-mpi pretrain CONFIG --to FILE.safetensors``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_config, add_overrides, given

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pretrain``."""
    add_config(parser, "a YAML file; its partition and its algorithm do not matter")
    add_overrides(parser)
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


def execute(asked: argparse.Namespace, comm: "Comm") -> int:
    """Train a network on all data in one place."""
    from ..config import read
    from ..mpi.ending import collectively
    from ..run.pretrain import pretrain

    how = given(asked, "config", "overrides")
    collectively(
        comm, lambda: pretrain(read(asked.config, asked.overrides), asked.config, comm.size, **how)
    )
    return 0


HELP = "Train a network on all data in one place, into a file for model.weights."
COMMAND = Command(HELP, add_arguments, execute, parallel=True, trains=True)
