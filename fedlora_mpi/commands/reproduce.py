"""``fedlora-mpi reproduce TABLE``: a parser for each table, whose help shows only what the table
takes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, given

if TYPE_CHECKING:
    from ..mpi.comm import Comm

FEDLORA = (*(f"table{n}" for n in range(1, 6)), "fig4", "fig6", "fig7")
TABLES = {  # what each is
    **{name: f"{name} of the FedLoRA paper" for name in FEDLORA},
    "table6": "the text row of the FedLoRA paper's Table 6",
    "pfedlora": "accuracy and cost of the pFedLoRA paper: clients with networks of their own",
    "fedhl": "LoRA of clients' own ranks on a backbone that is made here",
}
SEVERAL: dict[str, Any] = {"nargs": "+", "default": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each table. What a table does not take is not shown; ``Request`` refuses it in
    one line.
    """
    parser.description = (
        f"{HELP} Options stand behind the table; `reproduce TABLE --help` shows them."
    )
    tables = parser.add_subparsers(dest="table", metavar="TABLE", required=True)
    for table, about in TABLES.items():
        _add_table(
            tables.add_parser(table, help=about, description=about[0].upper() + about[1:] + "."),
            table,
        )


def _add_table(parser: argparse.ArgumentParser, table: str) -> None:
    """The arguments of one table."""

    def add(flag: str, help_: str, tables: tuple[str, ...] = tuple(TABLES), **how: Any) -> None:
        parser.add_argument(flag, help=help_ if table in tables else argparse.SUPPRESS, **how)

    sets = ("cifar10", "cifar100", "tiny_imagenet", "ag_news")
    data = {"table6": "ag_news", "fedhl": "both"}.get(table, "cifar10")
    some = {"table6": sets[3:], "pfedlora": sets[:2], "fedhl": (sets[0], sets[3])}.get(
        table, sets[:3]
    )
    add("--data", f"of {', '.join(some)} (default {data})", **SEVERAL, choices=sets, metavar="SET")
    alpha = {"table6": "1.0", "fedhl": "0.5"}.get(table, "0.1")
    add(
        "--alpha",
        f"of the Dirichlet split (default {alpha})",
        (*FEDLORA, "table6", "fedhl"),
        **SEVERAL,
        type=float,
    )
    texts = "the file of the training texts in DATA/AG_NEWS (default train.csv)"
    add("--text-train", texts, ("table6", "fedhl"), default="", metavar="FILE")
    add("--seeds", "default: 1 2 3, at small scale 1", **SEVERAL, type=int, metavar="SEED")
    add("--rounds", "default: the scale's; more of them go on with a finished run", type=int)
    rows = "rows of the table"
    rows += ", or any algorithm" if table in ("table1", "table6", "pfedlora") else ""
    add("--methods", rows, **SEVERAL, metavar="ROW")
    crowds = (
        "how many there are; all, 20 or 10 %% take part (default: all three, at small scale 10)"
    )
    add("--clients", crowds, ("pfedlora",), **SEVERAL, type=int, choices=(10, 50, 100))
    add(
        "--homogeneous",
        "CNN-1 for every client, and FedAvg as well",
        ("pfedlora",),
        action="store_true",
    )
    add(
        "--width",
        "of the network (default both)",
        ("fedhl",),
        **SEVERAL,
        choices=("narrow", "wide"),
    )
    part = "fraction of the clients in a round (default 1.0 0.4)"
    add("--participation", part, ("fedhl",), **SEVERAL, type=float, metavar="P")
    reached = "count rounds, bytes and FLOPs up to so many %% (default: what all methods reach)"
    add("--target", reached, ("pfedlora",), **SEVERAL, type=float, metavar="PERCENT")
    add("--scale", "full is the paper's experiment", choices=("small", "full"), default="small")
    add("--jobs", "runs at a time (default: one per core, or per GPU)", type=int, metavar="J")
    add("--ranks", "MPI processes of a run (default 1)", type=int, default=1, metavar="R")
    add("--root", "where the data sets are (default ~/data)", default="~/data", metavar="DATA")
    add("--download", "fetch a data set that is not there", action="store_true")
    folder = "default: runs/reproduce-SCALE"
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help=folder)
    add("--print-jobs", "run nothing; a line per run, and a Slurm array", action="store_true")
    add("--collect", "run nothing; the table of what is done", action="store_true")


def execute(asked: argparse.Namespace, comm: "Comm") -> int:
    """Carry out what is missing of a table, and print it."""
    from ..mpi.ending import collectively
    from ..reproduce.carrying_out import reproduce
    from ..reproduce.request import Request

    return collectively(comm, lambda: reproduce(Request(**given(asked))))


HELP = (
    "A table of the FedLoRA paper, pFedLoRA's or FedHL's, from runs of our own, beside its numbers."
)
COMMAND = Command(HELP, add_arguments, execute, trains=True)
