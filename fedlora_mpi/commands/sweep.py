"""``fedlora-mpi sweep CONFIG``."""

import argparse
from typing import TYPE_CHECKING, Any

from .command import Command, add_config_argument, as_keywords
from .submit import add_slurm_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sweep``."""
    add_config_argument(parser)
    axes_help = (
        "a key with several values: train.lr=0.01,0.1, seed='range(1,4)', "
        "algorithm='choice(fedavg,local)'; or with one, as for run; output=FOLDER is the folder of "
        "the sweep"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUES", help=axes_help)
    parser.add_argument(
        "--jobs", type=int, metavar="J", help="runs at a time (default: one per core, or per GPU)"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="R", help="MPI processes of a run (default 1)"
    )
    parser.add_argument(
        "--print-jobs", action="store_true", help="run nothing; a line for each run that is left"
    )
    add_search_arguments(parser.add_argument_group("search with Optuna (extra tune)"))
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument(
        "--slurm",
        action="store_true",
        help="queue the runs that are left as one array, at most J at once with --jobs J",
    )
    add_slurm_arguments(slurm)


def add_search_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the arguments of a search."""
    sampler_help = (
        "draw the values, also of train.lr='interval(0.01,1)' or 'tag(log, interval(1e-4,1))'; "
        "each trial is run for all values of the seeds"
    )
    parser.add_argument("--sampler", choices=("tpe", "random"), help=sampler_help)
    parser.add_argument("--trials", type=int, metavar="N", help="in all, also after a stop")
    parser.add_argument(
        "--metric", metavar="COLUMN", help="a column of the log's rounds (default accuracy)"
    )
    parser.add_argument(
        "--direction",
        choices=("maximize", "minimize"),
        help="default: by the metric's name, where that is clear",
    )
    pruner_help = "median (default) gives up a run that is below the median of the others"
    parser.add_argument("--pruner", choices=("median", "none"), help=pruner_help)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Carry out the runs of a sweep that are not done."""
    from ..mpi.ending import collectively
    from ..sweeps.sweep import Request, execute

    return collectively(comm, lambda: execute(Request(**_grouped_keywords(args))))


def _grouped_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as keywords: those of a search, and those for Slurm, as a mapping."""
    keywords = as_keywords(args)
    groups: dict[str, dict[str, Any]] = {}
    for group, add in {
        "search": add_search_arguments,
        "slurm_options": add_slurm_arguments,
    }.items():
        parser = argparse.ArgumentParser()
        add(parser)
        options = {name: keywords.pop(name) for name in vars(parser.parse_args([]))}
        groups[group] = {
            name: value
            for name, value in options.items()
            if value is not None and value is not False
        }
    return keywords | groups


COMMAND = Command(
    "Train every combination of several values; the same command again goes on.",
    add_arguments,
    execute,
    trains=True,
)
