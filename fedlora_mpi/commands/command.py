"""What a file of this folder says of its command."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

OVERRIDES_HELP = (
    "settings of the config by their dotted names, for instance train.lr=0.05 algorithm=fedavg"
)


class Command(NamedTuple):
    """A command: one line of help, its arguments, and what it does.

    add_arguments: adds them to a parser; execute: (what was asked, communicator) -> exit code.
    parallel: also under mpirun; trains: goes on when nobody reads its output; imports: a config may
    name classes of the working folder. Imports of what a command needs stay inside ``execute``, so
    that ``--help`` is quick and a broken library is one line.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace, Any], int]
    parallel: bool = False
    trains: bool = False
    imports: bool = True


def add_config_argument(parser: argparse.ArgumentParser, help_: str = "a YAML file") -> None:
    """A config."""
    parser.add_argument("config", help=help_)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings over those of a config."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES_HELP)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """One run folder."""
    parser.add_argument("run", type=Path, help="a run folder")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """One or more run folders."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")


def as_keywords(args: argparse.Namespace, *excluded: str) -> dict[str, Any]:
    """The arguments as keyword arguments, without ``excluded``."""
    return {name: value for name, value in vars(args).items() if name not in ("command", *excluded)}
