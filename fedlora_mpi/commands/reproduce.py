"""``fedlora-mpi reproduce TABLE``: each table has its own parser.

The help of a table shows only the options that apply to it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, as_keywords

if TYPE_CHECKING:
    from ..mpi.comm import Comm

FEDLORA_TABLES = (*(f"table{n}" for n in range(1, 6)), "fig4", "fig6", "fig7")
TABLES = {  # table -> description
    **{name: f"{name} of the FedLoRA paper" for name in FEDLORA_TABLES},
    "table6": "the text row of the FedLoRA paper's Table 6",
    "pfedlora": "accuracy and cost of the pFedLoRA paper: clients with networks of their own",
    "fedhl": "LoRA of clients' own ranks on a backbone that is made here",
    "fedhl_shift": "LoRA of clients' own ranks where the needed update has a high rank",
}
ONE_OR_MORE: dict[str, Any] = {"nargs": "+", "default": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each table.

    Options that a table does not take are hidden; ``Request`` refuses them with a one-line error.
    """
    parser.description = (
        f"{HELP} Options stand behind the table; `reproduce TABLE --help` shows them."
    )
    tables = parser.add_subparsers(dest="table", metavar="TABLE", required=True)
    for table, description in TABLES.items():
        _add_table(
            tables.add_parser(
                table, help=description, description=description[0].upper() + description[1:] + "."
            ),
            table,
        )


def _add_table(parser: argparse.ArgumentParser, table: str) -> None:
    """Add the arguments of one table."""

    def add_option(
        flag: str, help_: str, tables: tuple[str, ...] = tuple(TABLES), **options: Any
    ) -> None:
        parser.add_argument(flag, help=help_ if table in tables else argparse.SUPPRESS, **options)

    data_sets = ("cifar10", "cifar100", "tiny_imagenet", "ag_news")
    both = {"fedhl": "both", "fedhl_shift": "both"}
    default_set = {"table6": "ag_news", **both}.get(table, "cifar10")
    usual_sets = {
        "table6": data_sets[3:],
        "pfedlora": data_sets[:2],
        **dict.fromkeys(both, (data_sets[0], data_sets[3])),
    }.get(table, data_sets[:3])
    add_option(
        "--data",
        f"of {', '.join(usual_sets)} (default {default_set})",
        **ONE_OR_MORE,
        choices=data_sets,
        metavar="SET",
    )
    default_alpha = {
        "table6": "1.0",
        "fedhl": "0.5",
        "fedhl_shift": "inf 0.5; inf: independent and identically distributed",
    }.get(table, "0.1")
    add_option(
        "--alpha",
        f"of the Dirichlet split (default {default_alpha})",
        (*FEDLORA_TABLES, "table6", *both),
        **ONE_OR_MORE,
        type=float,
    )
    texts_help = "the file of the training texts in DATA/AG_NEWS (default train.csv)"
    add_option("--text-train", texts_help, ("table6", *both), default="", metavar="FILE")
    seeds_help = "default: 1 2 3" + ("" if table == "fedhl_shift" else ", at small scale 1")
    add_option("--seeds", seeds_help, **ONE_OR_MORE, type=int, metavar="SEED")
    add_option("--rounds", "default: the scale's; more of them go on with a finished run", type=int)
    rows_help = "rows of the table"
    rows_help += ", or any algorithm" if table in ("table1", "table6", "pfedlora") else ""
    add_option("--methods", rows_help, **ONE_OR_MORE, metavar="ROW")
    clients_help = (
        "how many there are; all, 20 or 10 %% take part (default: all three, at small scale 10)"
    )
    add_option(
        "--clients", clients_help, ("pfedlora",), **ONE_OR_MORE, type=int, choices=(10, 50, 100)
    )
    add_option(
        "--homogeneous",
        "CNN-1 for every client, and FedAvg as well",
        ("pfedlora",),
        action="store_true",
    )
    _add_pfedlora_cells(add_option)
    add_option(
        "--width",
        "of the network (default both)",
        ("fedhl",),
        **ONE_OR_MORE,
        choices=("narrow", "wide"),
    )
    add_option(
        "--lora-ranks",
        "of the clients: from 64 to 4, or from 16 to 1 (default both)",
        ("fedhl_shift",),
        **ONE_OR_MORE,
        choices=("high", "low"),
    )
    participation_help = "fraction of the clients in a round (default 1.0 0.4)"
    add_option(
        "--participation", participation_help, ("fedhl",), **ONE_OR_MORE, type=float, metavar="P"
    )
    target_help = "count rounds, bytes and FLOPs up to so many %% (default: what all methods reach)"
    add_option("--target", target_help, ("pfedlora",), **ONE_OR_MORE, type=float, metavar="PERCENT")
    scale_help = "full is the paper's experiment" + (
        "; medium has its 40 clients with 100 images each" if table == "table1" else ""
    )
    scales = ("small", "medium", "full") if table == "table1" else ("small", "full")
    add_option("--scale", scale_help, choices=scales, default="small")
    add_option(
        "--jobs", "runs at a time (default: one per core, or per GPU)", type=int, metavar="J"
    )
    add_option("--ranks", "MPI processes of a run (default 1)", type=int, default=1, metavar="R")
    add_option(
        "--root", "where the data sets are (default ~/data)", default="~/data", metavar="DATA"
    )
    add_option("--download", "fetch a data set that is not there", action="store_true")
    output_help = "default: runs/reproduce-SCALE"
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help=output_help)
    add_option(
        "--print-jobs", "run nothing; a line per run, and a Slurm array", action="store_true"
    )
    add_option("--collect", "run nothing; the table of what is done", action="store_true")


def _add_pfedlora_cells(add_option: Callable[..., None]) -> None:
    """Add the options of ``pfedlora`` that change a cell or pFedLoRA's rows of it."""
    table = ("pfedlora",)
    classes_help = "of each client (default 2; cifar100: 10)"
    add_option("--classes", classes_help, table, **ONE_OR_MORE, type=int, metavar="K")
    samples_help = (
        "training samples of a client at most (default: the scale's); batches of a fifth of them"
    )
    add_option("--samples", samples_help, table, **ONE_OR_MORE, type=int, metavar="N")
    places = ("matrix", "conv", "side", "alone")
    adapter_help = f"a row of pFedLoRA for each, of {', '.join(places)} (default matrix)"
    add_option("--adapter", adapter_help, table, **ONE_OR_MORE, choices=places, metavar="PLACE")
    rank_help = "a row of pFedLoRA for each (default 8)"
    add_option("--adapter-rank", rank_help, table, **ONE_OR_MORE, type=int, metavar="R")


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Carry out the missing runs of a table and print it."""
    from ..mpi.ending import collectively
    from ..reproduce.carrying_out import reproduce
    from ..reproduce.request import Request

    return collectively(comm, lambda: reproduce(Request(**as_keywords(args))))


HELP = (
    "A table of the FedLoRA paper, pFedLoRA's or FedHL's, from runs of our own, beside its numbers."
)
COMMAND = Command(HELP, add_arguments, execute, trains=True)
