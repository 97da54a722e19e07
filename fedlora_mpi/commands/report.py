"""``fedlora-mpi report RUN ...``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_runs

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``report``."""
    add_runs(parser)
    page = "write report.html there, figures as PNG and PDF, tables as CSV, Markdown and LaTeX"
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=page)


def execute(asked: argparse.Namespace, comm: "Comm") -> int:
    """Print a table of runs, or write their page."""
    from ..mpi.ending import collectively

    print(collectively(comm, lambda: _told(asked)))
    return 0


def _told(asked: argparse.Namespace) -> str:
    if asked.output:
        from ..analysis.page.write import write_report
        from ..core.escapes import escape_line

        return escape_line(write_report(asked.runs, asked.output))
    from ..analysis.report import table

    return table(asked.runs)


HELP = "The accuracy of runs as a table; with -o a page of figures and tables, self-contained."
COMMAND = Command(HELP, add_arguments, execute, imports=False)
