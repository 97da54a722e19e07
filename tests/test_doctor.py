"""``fedlora-mpi doctor`` as a user runs it, on this machine and on ones with something amiss."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SLOW, TINY, built, command, environment, finished

from fedlora_mpi.cli import main
from fedlora_mpi.doctor.checks import CHECKS
from fedlora_mpi.doctor.command import examine
from fedlora_mpi.doctor.finding import Case, Finding
from fedlora_mpi.plan import storage

NAMES = "config Python environment launch GPUs threads HDF5 locks space torchvision Slurm ULFM".split()
LINE = re.compile(r"(ok|warning|failure) +(\w+) +(\S.*)")


def examined(cwd: Path, *arguments, python: str = sys.executable, **env: str):
    """(exit code, {name: (level, the rest)})."""
    done = finished([python, *command("doctor", *arguments)[1:]], cwd, **env)
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    found = {}
    for line in lines:
        level, name, rest = LINE.fullmatch(line).groups()
        found[name] = level, rest
    assert list(found) == [name for name in NAMES if name in found]
    assert re.fullmatch(r"\d+ ok, \d+ warning, \d+ failure", last)
    assert done.returncode == int("failure" in {level for level, _ in found.values()})
    return done.returncode, found


def python_without_mpirun(folder: Path) -> str:
    """A Python with the same libraries and no mpirun beside it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return str(folder / "bin/python")


def program(folder: Path, name: str, text: str) -> str:
    """A PATH on which ``name`` is this shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_machine_that_works_has_no_failure(tmp_path):
    code, found = examined(tmp_path, TINY, "output=runs/a")
    assert code == 0 and list(found) == NAMES and not list(tmp_path.iterdir())
    assert found["config"][1] == f"{TINY}, run folder runs/a"
    assert re.match(r"3\.\d+\.\d+ in .*; torch \d.*, h5py \d", found["Python"][1])
    if Path(sys.executable).with_name("mpirun").exists():
        assert found["launch"][0] == "ok" and found["launch"][1].startswith("2 ranks by ")
    assert "the run needs " in found["space"][1]


def test_a_run_folder_is_examined_where_it_is_now(tmp_path):
    assert main(["run", str(TINY), "rounds=1", f"output={tmp_path / 'run'}"]) == 0
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    before = sorted(tmp_path.rglob("*"))
    code, found = examined(tmp_path, moved)
    assert code == 0 and found["config"][1] == f"{moved}/config.yaml, run folder {moved}"
    assert found["HDF5"][1].endswith(f" in {moved}") and sorted(tmp_path.rglob("*")) == before


def test_a_broken_machine_has_a_remedy_in_each_line(tmp_path):
    """No mpirun, more threads than cores, a file in the way of the run folder, an sbatch without controller."""
    (tmp_path / "file").touch()
    program(tmp_path / "bin", "sbatch", "")
    path = program(tmp_path / "bin", "sinfo", "echo no route >&2; exit 1")
    without = os.pathsep.join(at for at in path.split(os.pathsep) if not (Path(at) / "mpirun").exists())
    bare = python_without_mpirun(tmp_path / "bare")
    asked = TINY, "engine.threads=4000", "output=file/run"
    code, found = examined(tmp_path, *asked, python=bare, PATH=without)
    assert code == 1
    assert found["launch"] == ("failure", "no mpirun beside this Python or on PATH, so one process only; "
                               "pip install 'fedlora-mpi[mpi]' or module load openmpi")
    assert found["threads"][0] == "failure" and re.match(r"engine.threads = 4000 on \d+ cores; engine.threads=1", found["threads"][1])
    for name in ("HDF5", "locks"):
        assert found[name][0] == "failure" and "file" in found[name][1] and "output=" in found[name][1]
    assert found["Slurm"] == ("warning", f"{tmp_path}/bin/sbatch is there, its controller is not: no route; "
                              "`sinfo` must work; ask the cluster's support")
    assert found["ULFM"][0] == "warning" and "pip install 'fedlora-mpi[mpi]'" in found["ULFM"][1]


def test_a_folder_that_cannot_be_written_and_data_that_is_not_there(tmp_path):
    data = "data.dataset=cifar10", f"data.root={tmp_path}/none"
    code, found = examined(tmp_path, TINY, *data, "output=/proc/run", "engine.device=cuda")
    assert code == 1 and found["HDF5"][0] == found["locks"][0] == found["space"][0] == "failure"
    assert found["HDF5"][1].startswith("/proc/") and "choose another output=" in found["HDF5"][1]
    if not shutil.which("nvidia-smi"):
        assert found["GPUs"][0] == "failure" and "engine.device=cpu" in found["GPUs"][1]


def test_programs_that_hang_or_start_strangers_do_not_stop_it(tmp_path):
    program(tmp_path, "sbatch", "")
    program(tmp_path, "sinfo", "sleep 600")
    path = program(tmp_path, "mpirun", 'while [ "$1" != -n ]; do shift; done; shift 2; "$@"; "$@"')
    bare, mpi = python_without_mpirun(tmp_path / "bare"), sorted(Path(sys.prefix).glob("lib/libmpi.so.*"))
    library = {"MPI4PY_LIBMPI": str(mpi[0])} if mpi else {}
    code, found = examined(tmp_path, python=bare, PATH=path, **library)
    assert code == 1 and list(found) == NAMES[1:] and "free in" in found["space"][1]
    assert found["Slurm"][0] == "warning" and "no answer" in found["Slurm"][1]
    said = "do not find each other" if mpi else "mpirun -n 2 ends with code 1: "
    assert found["launch"][0] == "failure" and said in found["launch"][1]
    assert found["ULFM"][0] == "warning"


def test_root_is_told_what_open_mpi_wants_and_a_mistake_in_the_config_stops_nothing(tmp_path):
    if os.geteuid() or not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("needs root and Open MPI")
    env = {name: value for name, value in environment().items() if not name.startswith("OMPI_ALLOW")}
    line = command("doctor", TINY, "train.lr=-1")
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    config, *rest = done.stdout.splitlines()
    assert config.startswith("failure  config       command line: train.lr = -1.0: must be a number above 0; ")
    assert len(rest) == len(NAMES) and "it refuses root; export OMPI_ALLOW_RUN_AS_ROOT=1 " in done.stdout


@pytest.mark.parametrize(
    "given, said",
    [
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "gone"}, "of a job that has ended"),
        ({"SLURM_NTASKS": "3"}, "SLURM_NTASKS = 3: run and resume want to be started as so many ranks"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "3"}, "SLURM_NTASKS = 3: "),  # the most that any says
        ({}, "no variables of another MPI or Slurm job"),
    ],
)
def test_variables_of_other_jobs_are_told(given, said, monkeypatch):
    for name in (*os.environ,):
        if name.startswith(("PMI", "OMPI_COMM", "SLURM")):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = CHECKS["environment"].find(Case(os.getcwd()))
    assert said in found.text and (found.level == "warning") == bool(given)


@pytest.mark.parametrize("level, code", [("ok", 0), ("warning", 0), ("failure", 1)])
def test_one_failure_alone_is_code_1(level, code, monkeypatch):
    def found(name, case):
        return Finding(level if name == "HDF5" else "ok", "so"), {}

    monkeypatch.setattr("fedlora_mpi.doctor.command._asked", found)
    assert examine(None, (), lambda line: None) == code


def test_the_space_that_a_run_needs_is_what_it_takes(tmp_path):
    folder = tmp_path / "run"
    assert main(["run", str(TINY), SLOW, f"output={folder}"]) == 0
    taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert taken <= storage(built(SLOW)) <= 2 * taken
