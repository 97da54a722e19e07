"""``fedlora-mpi partition CONFIG``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_config_argument, add_override_arguments, tell_resets

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``partition``."""
    add_config_argument(parser)
    add_override_arguments(parser)
    parser.add_argument(
        "-o", "--picture", type=Path, help="the PNG (default: CONFIG's name in this folder)"
    )
    folder_help = "write it into a new folder that PFLlib reads"
    parser.add_argument("--to", nargs=2, metavar=("pfllib", "FOLDER"), help=folder_help)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Print and draw which client holds which data, or write it for PFLlib."""
    from ..mpi.ending import collectively

    collectively(comm, lambda: _show_partition(args))
    return 0


def _show_partition(args: argparse.Namespace) -> None:
    from ..analysis.partition_table import save_figure, table
    from ..analysis.pfllib_export import write_folder
    from ..config import read
    from ..core.escapes import escape_line, escape_lines
    from ..experiment.parts import load_data, split_data, tell_hints

    config = read(args.config, args.overrides)
    if args.to and args.to[0] != "pfllib":
        raise ValueError(f"--to {args.to[0]}: is no format; there is pfllib")
    data = load_data(config, args.config)
    tell_hints(data, args.config)
    split = split_data(config, args.config, data)
    tell_resets(config)
    if args.to and data.targets != "classes":
        raise ValueError(f"--to pfllib: holds classes, and the targets are {data.targets}")
    if args.to:
        print(escape_line(write_folder(config, data, split, Path(args.to[1]))))
        return
    picture = args.picture or Path(f"partition-{Path(args.config).stem}.png")
    class_names = data.class_names if data.has_classes else ()
    counted = "classes" if data.has_classes else data.targets
    print(escape_lines(table(split, data.class_names, counted)))
    save_figure(split, picture, class_names)
    print(f"\npicture: {escape_line(picture)}")


COMMAND = Command("Who gets which data: a table, and a picture as PNG.", add_arguments, execute)
