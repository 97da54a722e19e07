"""What every test file has: one thread of torch, an order that suits the caches, and the fixtures
that several files use.
"""

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import far  # noqa: F401  registers its device: autograd counts devices once, in the first backward pass of a process
import pytest
import torch
from runs import TINY

from fedlora_mpi.cli import main
from fedlora_mpi.experiment import processes

torch.set_num_threads(1)  # the engine's default; sums in another order have other last bits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the conformance tests of one method next to each other: ``runs.played`` remembers its
    rounds.
    """

    def method(item):
        return getattr(item, "callspec", None) and str(item.callspec.params.get("name", "")) or ""

    at = [k for k, item in enumerate(items) if item.path.name == "test_conformance.py"]
    for k, item in zip(at, sorted((items[k] for k in at), key=method), strict=True):
        items[k] = item


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """{file: (bytes, time of the last write)} of a run folder."""
    files = (file for file in folder.rglob("*") if file.name != ".lock")  # readers hold it too
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[..., Path]:
    """``trained(*overrides, config=TINY)``: the run folder of that experiment, trained once a
    session.

    Only to be read: ``shutil.copytree`` it (or use ``copied``) where a test writes. A test that
    wrote is found at the end.
    """
    known: dict[tuple, tuple[Path, dict]] = {}

    def train(*overrides: str, config: str | Path = TINY) -> Path:
        key = str(config), overrides
        if key not in known:
            folder = tmp_path_factory.mktemp("trained") / "run"
            assert main(["run", str(config), *overrides, f"output={folder}"]) == 0
            known[key] = folder, listing(folder)
        return known[key][0]

    yield train
    for key, (folder, before) in known.items():
        assert listing(folder) == before, f"a test wrote to the shared run folder of {key}"


@pytest.fixture
def copied(trained, tmp_path) -> Callable[..., Path]:
    """``copied(*overrides, to="copy")``: a copy of ``trained(*overrides)`` in the test's own
    folder, to be written to.
    """

    def copy(*overrides: str, to: str = "copy", config: str | Path = TINY) -> Path:
        return Path(shutil.copytree(trained(*overrides, config=config), tmp_path / to))

    return copy


@pytest.fixture
def in_process(monkeypatch) -> list[list[str]]:
    """The runs of a table or a sweep are carried out in this process; the list has their
    arguments.
    """
    arguments: list[list[str]] = []

    def start(task: processes.Task, *_: object) -> SimpleNamespace:
        arguments.append(list(task.command[3:]))  # after "python -m fedlora_mpi"
        with open(task.log, "a") as log, redirect_stdout(log), redirect_stderr(log):
            code = main(arguments[-1])
        return SimpleNamespace(poll=lambda: code)

    monkeypatch.setattr(processes, "start_process", start)
    return arguments


@pytest.fixture(params=["here", pytest.param("apart", marks=pytest.mark.thorough)])
def carried(request) -> None:
    """The runs of ``reproduce`` are carried out in this process, and by ``make test-all`` each in
    its own, as it does.
    """
    if request.param == "here":
        request.getfixturevalue("in_process")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """``call(*arguments)``: a command of the package in a folder of its own; (exit code, stdout,
    stderr).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # commands put the folder in front

    def called(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return called


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """``plan`` without its trials: whatever is measured is one. For tests of what it counts."""
    from fedlora_mpi.plan.forecast import Costs, UnitCosts
    from fedlora_mpi.plan.line import CostLine

    def ones(built, *_):
        unit = UnitCosts(
            CostLine(1.0, 1.0, 1.0), CostLine(1.0, 1.0, 1.0), CostLine(1.0, 1.0, 1.0), 1.0
        )
        return Costs(
            dict.fromkeys(built.federation.clients.type_of, unit),
            1.0,
            1.0,
            1.0,
            (1.0, 1.0),
            1.0,
            1.0,
            1.0,
            1.0,
            1.0,
            1,
        ), 0.0

    monkeypatch.setattr("fedlora_mpi.plan.measure_costs", ones)
