"""``fedlora-mpi export RUN --to NAME``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_run_argument

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export``."""
    add_run_argument(parser)
    client_help = "its number, from 0; without, a file .pt or .safetensors has what all share"
    parser.add_argument("--client", type=int, metavar="K", help=client_help)
    target_help = (
        "NAME.pt, NAME.safetensors: a state dict; NAME.h5: accuracy and loss by round, as PFLlib "
        "keeps them; any other: a folder for peft"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="NAME", help=target_help)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Write a part of a run in a format of another program."""
    from ..analysis.export import export
    from ..analysis.run_view import open_run
    from ..core.escapes import escape_line
    from ..mpi.ending import collectively

    print(escape_line(collectively(comm, lambda: export(open_run(args.run), args.client, args.to))))
    return 0


HELP = (
    "A run for others: a client's model (.pt, .safetensors), its adapter for peft (a folder), "
    "results for PFLlib (.h5)."
)
COMMAND = Command(HELP, add_arguments, execute, imports=False)
