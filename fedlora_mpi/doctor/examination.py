"""``fedlora-mpi doctor``: check this machine, one line per check, with a remedy for each problem.

Each check runs in its own process with a time limit. So a check that hangs or crashes does not
affect the others.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.escapes import escape_line
from ..mpi.ending import CollectiveExit
from ..mpi.launch import function_command
from .checks import CHECKS, FINDERS, is_run_config
from .finding import Finding, Setup, run_command


def examine(
    target: Path | None, overrides: Sequence[str], write_line: Callable[[str], None] = print
) -> int:
    """Run all checks, print a line for each, and return the exit code: 1 if any fails."""
    levels, setup = [], Setup(os.getcwd())

    def report(name: str, finding: Finding) -> None:
        levels.append(finding.level)
        text = f"{finding.level:<8} {name:<12} {finding.text}" + (
            f"; {finding.remedy}" if finding.remedy else ""
        )
        write_line(escape_line(" ".join(text.splitlines())))

    if target is not None:
        source = target / "config.yaml" if target.is_dir() else target
        setup = Setup(str(target if target.is_dir() else Path.cwd()), str(source), tuple(overrides))
        finding, config_values = _run_check("config", setup)
        # later checks ignore a config with a mistake
        setup = setup._replace(**{"source": "", **config_values})
        report("config", finding)
    for name in CHECKS:
        if name not in FINDERS:
            report(name, _run_check(name, setup)[0])
        elif name != "config" and setup.source:
            finding, values = _run_check(name, setup)
            setup = setup._replace(**values)
            report(name, finding)
    count = {level: levels.count(level) for level in ("ok", "warning", "failure")}
    write_line(", ".join(f"{number} {level}" for level, number in count.items()))
    return int(count["failure"] > 0)


def _run_check(name: str, setup: Setup) -> tuple[Finding, dict[str, Any]]:
    """Run a check in its own process. Return its finding and the values of the config."""
    check = CHECKS[name]
    command = [*function_command(__name__, "answer"), name, json.dumps(setup)]
    code, out, err = run_command(command, check.limit)
    if code is None:
        return Finding("failure", f"no answer within {check.limit:g} s", check.remedy), {}
    if code:
        last_line = (err.strip().splitlines() or ["no message"])[-1]
        return Finding(
            "failure", f"the check ended with code {code}: {last_line}", check.remedy
        ), {}
    *finding, config_values = json.loads(out.splitlines()[-1])
    return Finding(*finding), config_values


def answer() -> None:
    """Run one check in this process and print its finding as the last line."""
    name, setup = sys.argv[1], Setup(*json.loads(sys.argv[2]))
    config_values: dict[str, Any] = {}
    if not is_run_config(setup):
        sys.path.append(os.getcwd())  # a config may name the user's own models and algorithms
    try:
        if name in FINDERS:
            config_values = FINDERS[name](setup)
        finding = CHECKS[name].run(setup._replace(**config_values))
    except Exception as error:  # any error of a broken installation is a finding
        text = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        kind = (
            ""
            if isinstance(error, ValueError | OSError | CollectiveExit)
            else f"{type(error).__name__}: "
        )
        finding = Finding("failure", f"{kind}{text}", CHECKS[name].remedy)
    print(f"\n{json.dumps([*finding, config_values])}")
