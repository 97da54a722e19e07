"""Commands under closed, unread and ASCII streams, in a folder full of strange files,
in a thread."""

import os
import subprocess
import sys
import threading

import pytest
from runs import TINY, command_line

from fedlora_mpi.cli import main
from fedlora_mpi.store.reader import RunFiles

thorough = pytest.mark.thorough
READING = (("report", "run"), ("digest", "run"), ("partition", str(TINY)), ("watch", "run", "--once"), ("--help",),
           ("submit", str(TINY), "--dry-run"))  # fmt: skip


@pytest.fixture
def home(trained):
    """A folder with a finished run of two rounds in ``run``."""
    return trained("rounds=2").parent


HEAVY = ("run", "plan", "partition", "doctor")  # commands that import torch, which takes seconds


def first_and(others):
    """The first of several cases, and the others in the thorough tests alone, but for commands that
    are quick.
    """
    first, *more = others

    def quick(each):
        return isinstance(each, tuple) and each[0] not in HEAVY

    return [first, *(each if quick(each) else pytest.param(each, marks=thorough) for each in more)]


def shell(line: str, folder, **environment: str) -> subprocess.CompletedProcess:
    """A line of bash in which $F is fedlora-mpi."""
    program = f'F() {{ {" ".join(command_line())} "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("closed", first_and(["<&- >&- 2>&-", "2>&-", ">&-", "<&-"]))
def test_a_run_does_not_need_its_streams(closed, home, tmp_path):
    done = shell(f"F run {TINY} rounds=2 output=run {closed}", tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (
        RunFiles(tmp_path / "run").checkpoint().digest()
        == RunFiles(home / "run").checkpoint().digest()
    )


@pytest.mark.parametrize(
    "arguments", first_and([*READING, ("plan", str(TINY))]), ids=lambda arguments: arguments[0]
)
def test_a_reader_that_leaves_ends_a_command_without_a_word(arguments, home):
    done = shell(f"F {' '.join(arguments)} | true; echo ${{PIPESTATUS[0]}}", home)
    assert done.stdout.strip() in ("141", "0") and done.stderr == "", done.stderr


@pytest.mark.parametrize("where", first_and(["2>&1", "2>/dev/full >/dev/full;"]))
def test_a_run_whose_lines_nobody_reads_goes_on(where, tmp_path):
    rest = "| true; echo ${PIPESTATUS[0]}" if where == "2>&1" else "echo $?"
    done = shell(f"F run {TINY} rounds=3 output=run {where} {rest}", tmp_path)
    assert done.stdout == "0\n", done.stderr
    assert RunFiles(tmp_path / "run").checkpoints()[-1] == 3


@pytest.mark.parametrize("arguments", first_and(READING), ids=lambda arguments: arguments[0])
def test_an_ascii_terminal_shows_everything(arguments, home):
    done = shell(f"F {' '.join(arguments)}", home, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and "codec" not in done.stderr and done.stdout.isascii(), (
        done.stderr
    )


@pytest.mark.thorough  # a process
def test_a_run_on_an_ascii_terminal_tells_its_progress(tmp_path):
    done = shell(f"F run {TINY} rounds=1 output=ä", tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (
        done.returncode == 0
        and "round 1/1 | accuracy" in done.stderr
        and done.stdout == "\\xe4: done\n"
    )


STRAYS = ("h5py", "random", "copy", "numpy", "torch", "typing", "argparse", "fedlora")


@pytest.mark.parametrize("arguments", first_and([("run", str(TINY), "rounds=1", "output=new"), *READING[:3], ("doctor", "run")]),
                         ids=lambda arguments: arguments[0])  # fmt: skip
def test_a_file_in_the_working_folder_takes_the_place_of_no_library(arguments, home, tmp_path):
    (tmp_path / "run").symlink_to(home / "run")
    for name in STRAYS:
        (tmp_path / f"{name}.py").write_text(f"open('touched-{name}', 'w'); raise SystemExit(3)")
    done = shell(f"F {' '.join(arguments)}", tmp_path)
    assert done.returncode == 0 or arguments[0] == "doctor", done.stderr
    assert not list(tmp_path.glob("touched-*"))


@pytest.mark.parametrize("name", ["report", "watch", "digest", "export"])
def test_commands_that_read_a_run_do_not_look_for_code_in_the_working_folder(
    name, home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    more = {"watch": ["--once"], "export": ["--to", "x.h5"]}.get(name, [])
    assert main([name, str(home / "run"), *more]) == 0
    assert str(tmp_path) not in sys.path
    capsys.readouterr()
    assert main(["partition", str(TINY)]) == 0 and sys.path[-1] == str(tmp_path)


def test_an_output_on_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["submit", str(TINY), "--dry-run"]) == 1
    assert (
        capsys.readouterr().err
        == "fedlora-mpi: standard output cannot be written: No space left on device\n"
    )


def test_a_command_works_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["run", str(TINY), "rounds=1"])))
    thread.start(), thread.join()
    assert codes == [0]


@pytest.mark.parametrize("name", ["run", "submit"])
def test_overrides_may_stand_behind_options(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--resume"] if name == "run" else ["--time", "60", "--dry-run"]
    assert main([name, str(TINY), "rounds=1", *more, "output=there", "seed=3"]) == 0
    if name == "submit":
        assert "rounds=1 output=there seed=3" in capsys.readouterr().out
    else:
        assert RunFiles(tmp_path / "there").config["seed"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "c", "--resum", "--x"),
        ("run", "c", "--x=1"),
        ("watch", "run", "a=b"),
        ("plan", "c", "--ranks", "2", "d"),
    ],
)
def test_what_no_command_knows_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2 and "error: " in capsys.readouterr().err
