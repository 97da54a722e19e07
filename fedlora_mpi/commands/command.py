"""The description of a command, which each file of this folder defines."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..core.packaged import packaged_configs

if TYPE_CHECKING:
    from ..config import Config

OVERRIDES_HELP = (
    "settings of the config by their dotted names, for instance train.lr=0.05 algorithm=fedavg; "
    "another method, model or partition keeps the keys that mean the same for both"
)


class Command(NamedTuple):
    """A command: one line of help, its arguments, and its function.

    add_arguments: adds the arguments to a parser; execute: (parsed arguments, communicator) -> exit
    code; parallel: whether it may run under mpirun; trains: whether it continues when nobody reads
    its output; imports: whether a config may name classes of the working folder; launch: (parsed
    arguments) -> exit code, obeys ``--ranks`` if the command has that option.

    A command imports what it needs inside ``execute``, so that ``--help`` is quick and a broken
    library gives a one-line error.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace, Any], int]
    parallel: bool = False
    trains: bool = False
    imports: bool = True
    launch: Callable[[argparse.Namespace], int] | None = None


def add_config_argument(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add the argument for a config. note: what the command does with it."""
    names = ", ".join(packaged_configs())
    action = parser.add_argument("config", help=f"a YAML file, or a name: {names}{note}")
    cast(Any, action).completer = complete_config


def complete_config(prefix: str, **of_argcomplete: object) -> list[str]:
    """Return the configs that begin with ``prefix``: names, YAML files and folders."""
    from argcomplete.completers import FilesCompleter

    files = FilesCompleter(allowednames=("yaml", "yml"))(prefix)
    return [name for name in packaged_configs() if name.startswith(prefix)] + files


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that override settings of a config."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help=OVERRIDES_HELP
    )


def add_ranks_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the number of ranks on this machine."""
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="R",
        help="start so many processes on this machine by mpirun: a server and R - 1 workers",
    )


def add_quiet_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that leaves out the progress of a training."""
    parser.add_argument("--quiet", action="store_true", help="print no line for each round")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for one run folder."""
    parser.add_argument("run", type=Path, help="a run folder")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for one or more run folders."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")


def as_keywords(args: argparse.Namespace, *excluded: str) -> dict[str, Any]:
    """Return the arguments as keyword arguments, without ``excluded``."""
    return {name: value for name, value in vars(args).items() if name not in ("command", *excluded)}


def tell_resets(config: "Config") -> None:
    """Say on stderr which keys the overrides of ``config`` have reset."""
    for line in config.resets:
        print(f"hint: {line}", file=sys.stderr, flush=True)
