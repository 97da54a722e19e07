"""``fedlora-mpi doctor`` as a user runs it, on this machine and on ones with something amiss."""

import io
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from runs import SLOW, TINY, build_tiny, command_line, run_process

from fedlora_mpi.doctor import examination as doctor
from fedlora_mpi.doctor.checks import CHECKS
from fedlora_mpi.doctor.examination import examine
from fedlora_mpi.doctor.finding import Finding, Setup
from fedlora_mpi.plan import storage_bytes

NAMES = [
    "config",
    "Python",
    "environment",
    "launch",
    "GPUs",
    "threads",
    "HDF5",
    "locks",
    "build",
    "space",
    "torchvision",
    "Slurm",
    "ULFM",
]
WITHOUT_BUILD = [name for name in NAMES if name != "build"]  # there is no valid config
LINE = re.compile(r"(ok|warning|failure) +(\w+) +(\S.*)")


def read(code: int, out: str, err: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """(exit code, {name: (level, the rest)}) of what doctor says."""
    assert err == ""
    *lines, last = out.splitlines()
    found = {}
    for line in lines:
        level, name, rest = LINE.fullmatch(line).groups()
        found[name] = level, rest
    assert list(found) == [name for name in NAMES if name in found]
    assert re.fullmatch(r"\d+ ok, \d+ warning, \d+ failure", last)
    assert code == int("failure" in {level for level, _ in found.values()})
    return code, found


@pytest.fixture
def examined(call, monkeypatch, capsys):
    """``examined(*arguments)``: ``fedlora-mpi doctor`` whose checks are in this process; as
    ``read``.
    """

    def ended(line, limit):
        monkeypatch.setattr(sys, "argv", line[-3:])
        with redirect_stdout(io.StringIO()) as out:
            doctor.answer()
        return 0, out.getvalue(), ""

    def examine(*arguments):
        capsys.readouterr()  # a run that was trained for the test
        return read(*call("doctor", *arguments))

    monkeypatch.setattr(doctor, "run_command", ended)
    return examine


@pytest.fixture
def leave_out(monkeypatch):
    """``leave_out(*names)``: without these checks, which another test has."""
    return lambda *names: monkeypatch.setattr(
        doctor, "CHECKS", {n: check for n, check in CHECKS.items() if n not in names}
    )


def python_without_mpirun(folder: Path) -> str:
    """This Python in a folder that has no mpirun."""
    return program(folder, "python", f'exec {sys.executable} "$@"')


def program(folder: Path, name: str, text: str) -> str:
    """The path of a shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


@pytest.mark.thorough  # two ranks and a process for each check
def test_a_machine_that_works_has_no_failure(tmp_path):
    done = run_process(command_line("doctor", TINY, "output=runs/a"), tmp_path)
    code, found = read(done.returncode, done.stdout, done.stderr)
    assert code == 0 and list(found) == NAMES and not list(tmp_path.iterdir())
    assert found["config"][1] == f"{TINY}, run folder runs/a"
    assert re.match(r"3\.\d+\.\d+ in .*; torch \d.*, h5py \d", found["Python"][1])
    if Path(sys.executable).with_name("mpirun").exists():
        assert found["launch"][0] == "ok" and found["launch"][1].startswith("2 ranks by ")
    assert "the run needs " in found["space"][1]


def test_a_run_folder_is_examined_where_it_is_now(copied, examined, leave_out, tmp_path):
    leave_out("launch", "ULFM")
    moved = copied(to="moved")
    before = sorted(tmp_path.rglob("*"))
    code, found = examined(moved)
    assert code == 0 and found["config"][1] == f"{moved}/config.yaml, run folder {moved}"
    assert found["HDF5"][1].endswith(f" in {moved}") and sorted(tmp_path.rglob("*")) == before


def test_a_broken_machine_has_a_remedy_in_each_line(examined, leave_out, tmp_path, monkeypatch):
    """No mpirun, more threads than cores, a file in the way of the run folder, an sbatch without
    controller.
    """
    leave_out("build")  # it would give this process so many threads
    (tmp_path / "file").touch()
    sbatch = program(tmp_path / "bin", "sbatch", "")
    program(tmp_path / "bin", "sinfo", "echo no route >&2; exit 1")
    others = [
        at for at in os.environ["PATH"].split(os.pathsep) if not (Path(at) / "mpirun").exists()
    ]
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), *others]))
    monkeypatch.setattr(sys, "executable", python_without_mpirun(tmp_path / "bare"))
    code, found = examined(TINY, "engine.threads=4000", "output=file/run")
    assert code == 1
    assert found["launch"] == (
        "failure",
        "no mpirun beside this Python or on PATH, so one process only; "
        "pip install 'fedlora-mpi[mpi]' or module load openmpi",
    )
    assert found["threads"][0] == "failure" and re.match(
        r"engine.threads = 4000 on \d+ cores; engine.threads=1", found["threads"][1]
    )
    for name in ("HDF5", "locks"):
        assert (
            found[name][0] == "failure" and "file" in found[name][1] and "output=" in found[name][1]
        )
    assert found["Slurm"] == (
        "warning",
        f"{sbatch} is there, its controller is not: no route; "
        "`sinfo` must work; ask the cluster's support",
    )
    assert found["ULFM"][0] == "warning" and "pip install 'fedlora-mpi[mpi]'" in found["ULFM"][1]


def test_a_folder_that_cannot_be_written_and_data_that_is_not_there(examined, leave_out, tmp_path):
    leave_out("launch", "ULFM")
    data = "data.dataset=cifar10", f"data.root={tmp_path}/none"
    code, found = examined(TINY, *data, "output=/proc/run", "engine.device=cuda")
    assert code == 1 and found["HDF5"][0] == found["locks"][0] == found["build"][0] == "failure"
    assert found["build"][1].startswith("engine.device = cuda: ") or shutil.which("nvidia-smi")
    build = examined(TINY, *data, "output=/proc/run")[1]["build"][1]
    assert f"data.root = {tmp_path}/none: cifar10 is missing" in build
    assert "needs" not in found["space"][1] and "cifar10" not in found["space"][1]
    assert found["HDF5"][1].startswith("/proc/") and "choose another output=" in found["HDF5"][1]
    if not shutil.which("nvidia-smi"):
        assert found["GPUs"][0] == "failure" and "engine.device=cpu" in found["GPUs"][1]


def test_programs_that_hang_or_start_strangers_do_not_stop_it(examined, tmp_path, monkeypatch):
    program(tmp_path, "sbatch", "")
    program(tmp_path, "sinfo", "sleep 600")
    program(tmp_path, "mpirun", 'while [ "$1" != -n ]; do shift; done; shift 2; "$@"; "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if mpi := sorted(Path(sys.prefix).glob("lib/libmpi.so.*")):
        monkeypatch.setenv("MPI4PY_LIBMPI", str(mpi[0]))
    monkeypatch.setattr(sys, "executable", python_without_mpirun(tmp_path / "bare"))
    # of which sinfo has one second
    monkeypatch.setitem(CHECKS, "Slurm", CHECKS["Slurm"]._replace(limit=6))
    code, found = examined()
    assert code == 1 and list(found) == WITHOUT_BUILD[1:] and "free in" in found["space"][1]
    assert found["Slurm"][0] == "warning" and "no answer" in found["Slurm"][1]
    said = "do not find each other" if mpi else "mpirun -n 2 ends with code 1: "
    assert found["launch"][0] == "failure" and said in found["launch"][1]
    assert found["ULFM"][0] == "warning"


@pytest.mark.parametrize(
    "end, said",
    [
        ((None, "", ""), "no answer within 60 s"),
        ((-11, "", "a line\nthe last line\n"), "the check ended with code -11: the last line"),
        ((1, "", ""), "the check ended with code 1: no message"),
    ],
)
def test_a_check_that_hangs_or_crashes_is_a_failure_with_its_remedy(end, said, monkeypatch, call):
    monkeypatch.setattr(
        doctor,
        "run_command",
        lambda line, limit: end if line[-2] == "HDF5" else (0, '["ok", "fine", "", {}]', ""),
    )
    code, found = read(*call("doctor"))
    assert code == 1 and found.pop("HDF5") == ("failure", f"{said}; {CHECKS['HDF5'].remedy}")
    assert set(found.values()) == {("ok", "fine")} and len(found) == len(CHECKS) - 3


def test_one_rank_of_several_speaks(call, monkeypatch):
    monkeypatch.setattr("fedlora_mpi.doctor.examination.examine", lambda *_: print("spoke"))
    for rank, out in (("0", "spoke\n"), ("1", "")):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        assert call("doctor")[1] == out


def test_no_launcher_no_ranks_recommended(monkeypatch):
    monkeypatch.setattr("fedlora_mpi.doctor.checks.find_mpirun", lambda: "mpirun")
    assert "--ranks " in CHECKS["threads"].run(Setup(os.getcwd())).text
    monkeypatch.setattr("fedlora_mpi.doctor.checks.find_mpirun", lambda: None)
    assert "ranks" not in CHECKS["threads"].run(Setup(os.getcwd())).text


def test_root_is_told_what_open_mpi_wants_and_a_mistake_in_the_config_stops_nothing(
    examined, monkeypatch
):
    if os.geteuid() or not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("needs root and Open MPI")
    for name in [name for name in os.environ if name.startswith("OMPI_ALLOW")]:
        monkeypatch.delenv(name)
    code, found = examined(TINY, "train.lr=-1")
    level, text = found["config"]
    assert code == 1 and list(found) == WITHOUT_BUILD
    assert level == "failure" and text.startswith(
        "command line: train.lr = -1.0: must be a number above 0; "
    )
    assert "it refuses root; export OMPI_ALLOW_RUN_AS_ROOT=1 " in found["launch"][1]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "gone"}, "of a job that has ended"),
        (
            {"SLURM_NTASKS": "3"},
            "SLURM_NTASKS = 3: run and resume want to be started as so many ranks",
        ),
        # the most that any says
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "3"}, "SLURM_NTASKS = 3: "),
        ({}, "no variables of another MPI or Slurm job"),
    ],
)
def test_variables_of_other_jobs_are_told(given, said, monkeypatch):
    for name in (*os.environ,):
        if name.startswith(("PMI", "OMPI_COMM", "SLURM")):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = CHECKS["environment"].run(Setup(os.getcwd()))
    assert said in found.text and (found.level == "warning") == bool(given)


@pytest.mark.parametrize("level, code", [("ok", 0), ("warning", 0), ("failure", 1)])
def test_one_failure_alone_is_code_1(level, code, monkeypatch):
    def found(name, case):
        return Finding(level if name == "HDF5" else "ok", "so"), {}

    monkeypatch.setattr("fedlora_mpi.doctor.examination._run_check", found)
    assert examine(None, (), lambda line: None) == code


def test_the_space_that_a_run_needs_is_what_it_takes(trained):
    taken = sum(path.stat().st_size for path in trained(SLOW).rglob("*") if path.is_file())
    assert taken <= storage_bytes(build_tiny(SLOW)) <= 2 * taken
