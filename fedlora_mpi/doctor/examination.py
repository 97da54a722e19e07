"""``fedlora-mpi doctor``: whether everything works on this machine, a line each with its remedy.

Each check is a process of its own with a time limit, so none can take the others along, whatever
hangs or crashes.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.escapes import escape_line
from ..mpi.launch import function_command
from .checks import CHECKS, facts, recorded
from .finding import Case, Finding, ended


def examine(
    target: Path | None, overrides: Sequence[str], say: Callable[[str], None] = print
) -> int:
    """Carry out all checks, a line each; returns the exit code: 1 when something fails."""
    levels, case = [], Case(os.getcwd())

    def tell(name: str, found: Finding) -> None:
        levels.append(found.level)
        text = f"{found.level:<8} {name:<12} {found.text}" + (
            f"; {found.remedy}" if found.remedy else ""
        )
        say(escape_line(" ".join(text.splitlines())))

    if target is not None:
        source = target / "config.yaml" if target.is_dir() else target
        case = Case(str(target if target.is_dir() else Path.cwd()), str(source), tuple(overrides))
        found, said = _asked("config", case)
        case = case._replace(
            **{"source": "", **said}
        )  # a config with a mistake is left aside from here on
        tell("config", found)
    for name in CHECKS:
        if name != "config":
            tell(name, _asked(name, case)[0])
    count = {level: levels.count(level) for level in ("ok", "warning", "failure")}
    say(", ".join(f"{number} {level}" for level, number in count.items()))
    return int(count["failure"] > 0)


def _asked(name: str, case: Case) -> tuple[Finding, dict[str, Any]]:
    """What the check finds, in a process of its own; and what the config says."""
    check = CHECKS[name]
    line = [*function_command(__name__, "answer"), name, json.dumps(case)]
    code, out, err = ended(line, check.limit)
    if code is None:
        return Finding("failure", f"no answer within {check.limit:g} s", check.remedy), {}
    if code:
        last = (err.strip().splitlines() or ["no message"])[-1]
        return Finding("failure", f"the check ended with code {code}: {last}", check.remedy), {}
    *found, said = json.loads(out.splitlines()[-1])
    return Finding(*found), said


def answer() -> None:
    """The process of one check: its finding as the last line of the output."""
    name, case = sys.argv[1], Case(*json.loads(sys.argv[2]))
    read: dict[str, Any] = {}
    if not recorded(case):
        sys.path.append(os.getcwd())  # a config may name the user's own models and algorithms
    try:
        if name == "config":
            read = facts(case)
        found = CHECKS[name].find(case._replace(**read))
    except Exception as error:  # whatever a broken installation raises is the finding
        text = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        found = Finding("failure", f"{kind}{text}", CHECKS[name].remedy)
    print(f"\n{json.dumps([*found, read])}")
