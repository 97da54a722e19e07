"""``fedlora-mpi partition CONFIG``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_config, add_overrides

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``partition``."""
    add_config(parser)
    add_overrides(parser)
    parser.add_argument(
        "-o", "--picture", type=Path, help="the PNG (default: CONFIG's name in this folder)"
    )
    folder = "write it into a new folder that PFLlib reads"
    parser.add_argument("--to", nargs=2, metavar=("pfllib", "FOLDER"), help=folder)


def execute(asked: argparse.Namespace, comm: "Comm") -> int:
    """Print and draw who holds which data, or write it for PFLlib."""
    from ..mpi.ending import collectively

    collectively(comm, lambda: _show(asked))
    return 0


def _show(asked: argparse.Namespace) -> None:
    from ..analysis.partition_table import save_figure, table
    from ..analysis.pfllib_export import write_folder
    from ..config import read
    from ..core.escapes import escape_line, escape_lines
    from ..run.assembly import load_data, split_data, tell_hints

    config = read(asked.config, asked.overrides)
    if asked.to and asked.to[0] != "pfllib":
        raise ValueError(f"--to {asked.to[0]}: is no format; there is pfllib")
    data = load_data(config, asked.config)
    tell_hints(data, asked.config)
    split = split_data(config, asked.config, data)
    if asked.to:
        print(escape_line(write_folder(config, data, split, Path(asked.to[1]))))
        return
    picture = asked.picture or Path(f"partition-{Path(asked.config).stem}.png")
    print(escape_lines(table(split, data.class_names)))
    save_figure(split, picture, data.class_names)
    print(f"\npicture: {escape_line(picture)}")


COMMAND = Command("Who gets which data: a table, and a picture as PNG.", add_arguments, execute)
