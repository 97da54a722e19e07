"""``fedlora-mpi report RUN ...``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, add_run_arguments

if TYPE_CHECKING:
    from ..mpi.comm import Comm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    add_run_arguments(parser)
    output_help = (
        "write report.html there, figures as PNG and PDF, tables as CSV, Markdown and LaTeX"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=output_help)


def execute(args: argparse.Namespace, comm: "Comm") -> int:
    """Print a table of runs, or write a report page."""
    from ..mpi.ending import collectively

    print(collectively(comm, lambda: _report_text(args)))
    return 0


def _report_text(args: argparse.Namespace) -> str:
    from ..store.sweep_folder import expand_sweeps, wanted_runs

    paths = expand_sweeps(args.runs)
    wanted_of_sweep = wanted_runs(args.runs)
    if args.output:
        from ..analysis.page.write import write_report
        from ..core.escapes import escape_line

        return escape_line(write_report(paths, args.output, wanted_of_sweep))
    from ..analysis.report import comparison_text, table

    if not wanted_of_sweep:
        return table(paths)
    return f"{table(paths)}\n{comparison_text(paths, wanted_of_sweep)}".rstrip()


HELP = (
    "The accuracy of runs, or of all runs of a sweep, as a table; with -o a page of figures and "
    "tables, self-contained."
)
COMMAND = Command(HELP, add_arguments, execute, imports=False)
