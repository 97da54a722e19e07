"""``make mutants``: break the package in one place at a time, and see which tests notice.

A mutant is an entry of a ``*.toml`` beside this file: ``name`` (what is wrong in it), ``file``,
``old`` (text that is in the file once), ``new``, and ``tests`` (files or tests of which one should
fail; a test without its parameters is all of them). ``fast = false`` says that ``make test`` alone
need not notice. It works on a copy of the tree, so that nothing has to be restored.

Of each mutant its ``tests`` run first, those of ``make test`` before those of ``make test-all``. If
they do not notice, all of ``make test`` and then all of ``make test-all`` run. The exit code is 0
if each mutant was killed, and all but ``fast = false`` by ``make test``. Arguments are names, or
parts of names, of the only mutants to try.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIERS = {"test": "not thorough and not slow", "test-all": "thorough and not slow"}
FAILED, NOTHING_RAN = 1, 5  # exit codes of pytest
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "runs", ".*_cache", "__pycache__", ".hypothesis", "*.egg-info"
)


class Mutant(NamedTuple):
    """One change that makes the package wrong."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    fast: bool = True

    def apply_to(self, text: str) -> str:
        """The file's text with the change. Raises ValueError where ``old`` is not in it exactly
        once.
        """
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has `old` {times} times, not once")
        return text.replace(self.old, self.new)


class Verdict(NamedTuple):
    """What became of a mutant; ``tier``: the first that noticed, None where none did."""

    mutant: Mutant
    tier: str | None
    test: str
    seconds: float

    @property
    def is_expected(self) -> bool:
        return self.tier == "test" or (self.tier is not None and not self.mutant.fast)


def read_mutants() -> list[Mutant]:
    """All of the lists beside this file, in their order."""
    entries = [
        entry
        for file in sorted(HERE.glob("*.toml"))
        for entry in tomllib.loads(file.read_text())["mutant"]
    ]
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def run_pytest(tree: Path, tier: str, tests: Sequence[str], jobs: int = 1) -> tuple[int, str]:
    """(exit code, first failed test) of these tests in a tree, as far as the first failure."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        TIERS[tier],
        "--no-header",
        "-rfE",
        *tests,
    ]
    command += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    path = os.pathsep.join([str(tree), str(tree / "tests")])
    result = subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [text for text in result.stdout.splitlines() if text.startswith(("FAILED ", "ERROR "))]
    name = failed[0].split(" - ")[0].partition(" ")[2] if failed else result.stdout[-2000:]
    return result.returncode, name


def judge_mutant(mutant: Mutant, trees: "Queue[Path]") -> Verdict:
    """Apply a mutant in one of the trees, run the tests, and take it back."""
    tree, started = trees.get(), time.monotonic()
    file = tree / mutant.file
    original = file.read_text()
    try:
        file.write_text(mutant.apply_to(original))
        for tests in (mutant.tests, ()):
            for tier in TIERS:
                code, name = run_pytest(tree, tier, tests)
                if code == FAILED:
                    return Verdict(mutant, tier, name, time.monotonic() - started)
                if code not in (0, NOTHING_RAN):
                    raise RuntimeError(f"{mutant.name}: pytest ended with code {code}: {name}")
        return Verdict(mutant, None, "", time.monotonic() - started)
    finally:
        file.write_text(original)
        trees.put(tree)


def judge_mutants(selected: Sequence[Mutant], jobs: int) -> Iterator[Verdict]:
    """The verdict of each mutant, in order, from ``jobs`` trees at a time."""
    with tempfile.TemporaryDirectory() as home:
        trees: Queue[Path] = Queue()
        for job in range(jobs):
            trees.put(Path(shutil.copytree(ROOT, Path(home) / str(job), ignore=IGNORED)))
        all_tests = list(dict.fromkeys(test for mutant in selected for test in mutant.tests))
        for tier in TIERS:
            code, name = run_pytest(Path(home) / "0", tier, all_tests, jobs)
            if code not in (0, NOTHING_RAN):
                raise RuntimeError(f"without any mutant {name} fails")
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(judge_mutant, selected, [trees] * len(selected))


def main(name_parts: Sequence[str]) -> int:
    """Print a line for each mutant as it is decided, and the sums."""
    selected = [
        mutant
        for mutant in read_mutants()
        if not name_parts or any(word in mutant.name for word in name_parts)
    ]
    if not selected:
        sys.exit(f"no mutant's name has {' or '.join(name_parts)} in it")
    print("| mutant | killed by | first failed test | s |\n|---|---|---|---:|", flush=True)
    verdicts_so_far = []
    for verdict in judge_mutants(selected, int(os.environ.get("JOBS", "2"))):
        verdicts_so_far.append(verdict)
        print(
            f"| {verdict.mutant.name} | {verdict.tier or 'SURVIVED'} | {verdict.test} | "
            f"{verdict.seconds:.0f} |",
            flush=True,
        )
    num_by_tier = {
        tier: sum(verdict.tier == tier for verdict in verdicts_so_far) for tier in (*TIERS, None)
    }
    print(
        f"\n{len(verdicts_so_far)} mutants: {num_by_tier['test']} killed by `make test`, {num_by_tier['test-all']} by `make "
        f"test-all`, {num_by_tier[None]} survived"
    )
    return 0 if all(verdict.is_expected for verdict in verdicts_so_far) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
