"""``fedlora-mpi reproduce TABLE``: each table has its own parser.

The help of a table shows only the options that apply to it.
"""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    "fedhl_text": "LoRA of clients' own ranks tunes a language model that is made here",
    "neighbours": "methods named beside FedHL, under strong label skew",
}
ONE_OR_MORE: dict[str, Any] = {"nargs": "+", "default": ()}
_NUMBERS: dict[str, Any] = ONE_OR_MORE | {"type": int}
_FHL, _ADAPTERS = ("fedhl", "fedhl_shift"), ("matrix", "conv", "side", "alone")


class Option(NamedTuple):
    """An option of the parser of each table; other tables than ``tables`` hide it."""

    flag: str
    help: str | Mapping[str, str]  # or that of a table; "": that of the others
    settings: Mapping[str, Any]  # further arguments of ``add_argument``
    tables: Collection[str] = tuple(TABLES)

    def help_of(self, table: str) -> str:
        """The help for one table."""
        if table not in self.tables:
            return argparse.SUPPRESS
        return self.help if isinstance(self.help, str) else self.help.get(table, self.help[""])


OPTIONS = (
    Option(
        "--data",
        {
            **dict.fromkeys(("table6", "fedhl_text"), "of ag_news (default ag_news)"),
            "pfedlora": "of cifar10, cifar100 (default cifar10)",
            "neighbours": "of cifar10, cifar100 (default cifar10)",
            **dict.fromkeys(_FHL, "of cifar10, ag_news (default both)"),
            "": "of cifar10, cifar100, tiny_imagenet (default cifar10)",
        },
        ONE_OR_MORE
        | {"choices": ("cifar10", "cifar100", "tiny_imagenet", "ag_news"), "metavar": "SET"},
    ),
    Option(
        "--alpha",
        {
            "table6": "of the Dirichlet split (default 1.0)",
            "fedhl": "of the Dirichlet split (default 0.5)",
            "fedhl_shift": "of the Dirichlet split (default inf 0.5; inf: independent and "
            "identically distributed)",
            "neighbours": "of the Dirichlet split (default 0.05 0.1)",
            "": "of the Dirichlet split (default 0.1)",
        },
        ONE_OR_MORE | {"type": float},
        (*FEDLORA_TABLES, "table6", *_FHL, "neighbours"),
    ),
    Option(
        "--text-train",
        "the file of the training texts in DATA/AG_NEWS (default train.csv)",
        {"default": "", "metavar": "FILE"},
        ("table6", *_FHL, "fedhl_text"),
    ),
    Option(
        "--seeds",
        {
            **dict.fromkeys(("fedhl_shift", "fedhl_text", "neighbours"), "default: 1 2 3"),
            "": "default: 1 2 3, at small scale 1",
        },
        _NUMBERS | {"metavar": "SEED"},
    ),
    Option(
        "--rounds", "default: the scale's; more of them go on with a finished run", {"type": int}
    ),
    Option(
        "--methods",
        {
            **dict.fromkeys(
                ("table1", "table6", "pfedlora", "neighbours"),
                "rows of the table, or any algorithm",
            ),
            "": "rows of the table",
        },
        ONE_OR_MORE | {"metavar": "ROW"},
    ),
    Option(
        "--clients",
        "how many there are; all, 20 or 10 %% take part (default: all three, at small scale 10)",
        _NUMBERS | {"choices": (10, 50, 100)},
        ("pfedlora",),
    ),
    Option(
        "--homogeneous",
        "CNN-1 for every client, and FedAvg as well",
        {"action": "store_true"},
        ("pfedlora",),
    ),
    Option(
        "--classes",
        "of each client (default 2; cifar100: 10)",
        _NUMBERS | {"metavar": "K"},
        ("pfedlora",),
    ),
    Option(
        "--samples",
        "training samples of a client at most (default: the scale's); batches of a fifth of them",
        _NUMBERS | {"metavar": "N"},
        ("pfedlora",),
    ),
    Option(
        "--adapter",
        f"a row of pFedLoRA for each, of {', '.join(_ADAPTERS)} (default matrix)",
        ONE_OR_MORE | {"choices": _ADAPTERS, "metavar": "PLACE"},
        ("pfedlora",),
    ),
    Option(
        "--adapter-rank",
        "a row of pFedLoRA for each (default 8)",
        _NUMBERS | {"metavar": "R"},
        ("pfedlora",),
    ),
    Option(
        "--model",
        "cnn (for texts an encoder), or vit, for cifar10 alone: LoRA on q and v (default cnn)",
        ONE_OR_MORE | {"choices": ("cnn", "vit")},
        ("fedhl",),
    ),
    Option(
        "--width",
        "of the network (default both); a vit has one",
        ONE_OR_MORE | {"choices": ("narrow", "wide")},
        ("fedhl",),
    ),
    Option(
        "--lora-ranks",
        "of the clients: from 64 to 4, or from 16 to 1 (default both)",
        ONE_OR_MORE | {"choices": ("high", "low")},
        ("fedhl_shift",),
    ),
    Option(
        "--split",
        "which texts a client has: any, or those of a sub-topic of its own (default both)",
        ONE_OR_MORE | {"choices": ("iid", "subtopics")},
        ("fedhl_text",),
    ),
    Option(
        "--participation",
        "fraction of the clients in a round (default 1.0 0.4)",
        ONE_OR_MORE | {"type": float, "metavar": "P"},
        ("fedhl",),
    ),
    Option(
        "--target",
        "count rounds, bytes and FLOPs up to so many %% (default: what all methods reach)",
        ONE_OR_MORE | {"type": float, "metavar": "PERCENT"},
        ("pfedlora",),
    ),
    Option(
        "--scale",
        {
            "table1": "small, medium (20 clients with 100 images each, three seeds), or full, the "
            "paper's experiment (default small)",
            "": "small, or full, the paper's experiment (default small)",
        },
        {"choices": ("small", "medium", "full"), "default": "small", "metavar": "SCALE"},
    ),
    Option(
        "--jobs",
        "runs at a time (default: one per core, or per GPU)",
        {"type": int, "metavar": "J"},
    ),
    Option(
        "--ranks",
        "MPI processes of a run (default 1)",
        {"type": int, "default": 1, "metavar": "R"},
    ),
    Option(
        "--root",
        "where the data sets are (default ~/data)",
        {"default": "~/data", "metavar": "DATA"},
    ),
    Option("--download", "fetch a data set that is not there", {"action": "store_true"}),
    Option(
        "--print-jobs",
        "run nothing but what makes backbones; a line per run, and a Slurm array",
        {"action": "store_true"},
    ),
    Option("--collect", "run nothing; the table of what is done", {"action": "store_true"}),
)


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
    output_help = "default: runs/reproduce-SCALE"
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help=output_help)
    for option in OPTIONS:
        parser.add_argument(option.flag, help=option.help_of(table), **option.settings)


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
