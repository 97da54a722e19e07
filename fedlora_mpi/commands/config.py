"""``fedlora-mpi config CONFIG``."""

import argparse
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments, tell_resets

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``config``."""
    add_config_argument(parser)
    add_override_arguments(parser)
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also say of each setting of the method what it means, its unit and range, and where "
        "its default comes from",
    )


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Print every setting of a config and where it comes from."""
    from ..config import annotated_yaml, read
    from ..core.escapes import escape_lines
    from ..mpi.ending import collectively

    def annotate() -> str:
        text = annotated_yaml(args.config, args.overrides, args.explain)
        tell_resets(read(args.config, args.overrides))
        return text

    text = collectively(comm, annotate)
    print(escape_lines(text), end="", flush=True)
    return 0


COMMAND = Command(
    "Every setting of a config with its origin: the default, a line of a file, or the command "
    "line; trains nothing.",
    add_arguments,
    execute,
)
