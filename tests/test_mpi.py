"""Real ranks under mpirun: the same bits as one process, whatever is killed, stopped or wrong on
the way.

Every launch costs seconds of each core, so tests share them, and those of ``make test`` are few:
what a launch repeats of simulated ranks, or of one process, is thorough.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    SLOW,
    TESTS,
    TINY,
    assert_same_run,
    command_line,
    cpu_seconds,
    kill_all,
    last_checkpoint,
    launch,
    mpirun_command,
    package_lines,
    process_environment,
    rank_pids,
    run_process,
    wait_until,
)

from fedlora_mpi.cli import main
from fedlora_mpi.mpi import comm
from fedlora_mpi.mpi.comm import connect
from fedlora_mpi.mpi.launch import has_leftovers, is_launched
from fedlora_mpi.store.reader import RunFiles

LONG = ("rounds=10", "checkpoint.every=1", SLOW)
# seconds a step: a round of LONG takes a third of a second on 3 ranks
PAUSE = {"TEST_PAUSE": "0.01"}
VARIANTS = {"fedlora": (), "local": ("algorithm=local",)}
HOSTING = {**VARIANTS, "hosting": ("server_hosts_clients=true",)}
LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")

thorough = pytest.mark.thorough
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def several(
    ranks: int, commands: list, cwd: Path, **env: str
) -> tuple[list[list[int]], subprocess.CompletedProcess]:
    """([ranks][commands] exit codes, the launcher's end)."""
    line = [
        *mpirun_command(ranks),
        sys.executable,
        str(TESTS / "several.py"),
        "codes",
        json.dumps(commands),
    ]
    ended = run_process(line, cwd, **env)
    codes = [json.loads((cwd / f"codes-{rank}").read_text()) for rank in range(ranks)]
    return codes, ended


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """A folder of finished runs for each number of ranks, made when it is asked for."""
    made = {}

    def runs(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"ranks-{ranks}")
            of = HOSTING if ranks == 3 else VARIANTS
            commands = [["run", str(TINY), *more, f"output={name}"] for name, more in of.items()]
            codes, ended = several(ranks, commands, made[ranks])
            assert codes == [[0] * len(of)] * ranks and ended.returncode == 0, ended.stderr
        return made[ranks]

    return runs


def test_three_ranks_give_the_bits_of_one_process_whoever_hosts_clients(trained, spread):
    """And the log says what MPI was handed."""
    home = spread(3)
    for name, more in VARIANTS.items():
        assert_same_run(trained(*more), home / name)
    assert_same_run(trained(), home / "hosting")
    shards = (home / "hosting/checkpoints/000004").glob("worker-*.h5")
    assert sorted(f.name for f in shards) == [f"worker-{rank:04d}.h5" for rank in (0, 1, 2)]
    log = RunFiles(home / "fedlora").rounds()
    upload = log["bytes_up"] / 4 / 4  # numbers of one client
    # 3 ranks, 2 int64 a number, 6 metrics
    assert (log["bytes_mpi"] == 3 * 2 * 8 * (upload + 6)).all()


@thorough
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_number_of_ranks_gives_the_bits_of_one_process(trained, spread, ranks, name):
    assert_same_run(trained(*VARIANTS[name]), spread(ranks) / name)


def killed(home: Path, ranks: int, line: list, after: int) -> None:
    """Start a command on so many ranks, and kill them all when a checkpoint of round ``after`` or
    later is there.
    """
    launcher = mpirun_command(ranks) if ranks > 1 else []
    with launch([*launcher, *command_line(*line)], home, **PAUSE) as job:
        wait_until(lambda: last_checkpoint(home / "long") >= after, process=job)
        if ranks > 1:
            assert sorted(rank_pids(job.pid)) == list(range(ranks))
            kill_all(job)
        else:
            job.kill()
        assert job.wait() != 0
    assert after <= last_checkpoint(home / "long") < 10


def test_a_job_killed_on_3_ranks_ends_in_one_process_with_the_same_bits(trained, tmp_path):
    killed(tmp_path, 3, ["run", TINY, *LONG, "output=long"], 2)
    assert main(["resume", str(tmp_path / "long")]) == 0
    assert_same_run(trained(*LONG), tmp_path / "long")


@thorough
def test_a_job_killed_on_3_then_2_then_1_ranks_ends_on_4_with_the_same_bits(trained, tmp_path):
    killed(tmp_path, 3, ["run", TINY, *LONG, "output=long"], 2)
    killed(tmp_path, 2, ["resume", "long"], 4)
    killed(tmp_path, 1, ["resume", "long"], 6)
    ended = run_process([*mpirun_command(4), *command_line("resume", "long")], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(trained(*LONG), tmp_path / "long")


def test_sigusr1_stops_all_ranks_at_a_round_with_a_checkpoint_and_code_75(trained, tmp_path):
    arguments = json.dumps([["run", str(TINY), *LONG, "checkpoint.every=100", "output=long"]])
    line = [*mpirun_command(2), sys.executable, str(TESTS / "several.py"), "codes", arguments]
    with launch(line, tmp_path, **PAUSE) as job:
        wait_until(lambda: (tmp_path / "long/log.h5").exists(), process=job)
        wait_until(lambda: len(RunFiles(tmp_path / "long").rounds()["round"]), process=job)
        assert last_checkpoint(tmp_path / "long") == 0
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
        assert job.returncode != 0
    assert [json.loads((tmp_path / f"codes-{rank}").read_text()) for rank in range(2)] == [[75]] * 2
    rows = RunFiles(tmp_path / "long").rounds()["round"]
    assert 0 < last_checkpoint(tmp_path / "long") == rows[-1] < 10
    assert main(["resume", str(tmp_path / "long"), "checkpoint.every=1"]) == 0
    assert_same_run(trained(*LONG), tmp_path / "long")


def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path):
    line = command_line("run", TINY, "algorithm=user_parts:FailsOnRank2", "output=run")
    with launch([*mpirun_command(3), *line], tmp_path) as job:
        wait_until(lambda: (tmp_path / "run/log.h5").exists(), process=job)
        _, text = job.communicate(timeout=120)  # none waits for the one that failed
    assert job.returncode not in (0, 2, 75)
    assert "[rank 2 of 3] stopped all ranks:" in text
    assert text.count("Traceback (most recent call last)") == 1
    assert 'KeyError: "a mistake in the user\'s upload"' in text and "user_parts.py" in text
    assert not rank_pids(job.pid)


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """One launch on 3 ranks: a mistake in the config, one that only the data shows, and a loss that
    explodes.
    """
    home = tmp_path_factory.mktemp("refused")
    mistakes = (["train.lr=-1"], ["data.partition.minimum=100"], ["train.lr=1e30"])
    commands = [["run", str(TINY), *more, f"output=run-{i}"] for i, more in enumerate(mistakes)]
    return home, *several(3, commands, home)


@thorough
def test_a_mistake_is_one_line_and_code_2_on_all_ranks_and_leaves_no_folder(refused):
    home, codes, ended = refused
    assert [each[:2] for each in codes] == [[2, 2]] * 3
    lines = package_lines(ended.stderr)
    assert lines[0].startswith("fedlora-mpi: command line: train.lr = -1.0: must be")
    assert lines[1].startswith(f"fedlora-mpi: {TINY}: data.partition.clients = 7: ")
    assert not (home / "run-0").exists() and not (home / "run-1").exists()
    assert "Traceback" not in ended.stderr


@thorough
def test_a_loss_that_is_not_finite_ends_all_ranks_with_round_and_clients(refused):
    home, codes, ended = refused
    assert [each[2] for each in codes] == [1] * 3 and ended.returncode != 0
    assert len(package_lines(ended.stderr)) == 3  # one line for each of the three commands
    assert re.search(
        r"round 1: the loss or upload of client \d(, \d)* is not finite",
        package_lines(ended.stderr)[2],
    )
    assert not last_checkpoint(home / "run-2") and not len(
        RunFiles(home / "run-2").rounds()["round"]
    )


def idles(process: int) -> bool:
    """Whether a process takes no CPU for a while."""
    before = cpu_seconds(process)
    time.sleep(0.3)
    return cpu_seconds(process) - before < 0.03


@thorough
def test_a_waiting_server_leaves_its_core_to_others(tmp_path, record_property):
    line = command_line("run", TINY, *LONG, "output=run")
    with launch([*mpirun_command(2), *line], tmp_path, TEST_PAUSE="0.5") as job:
        wait_until(lambda: (tmp_path / "run/log.h5").exists(), process=job)
        server = rank_pids(job.pid)[0]
        wait_until(lambda: idles(server), process=job)  # it has begun to wait
        before, began = cpu_seconds(server), time.monotonic()
        time.sleep(2.5)
        share = (cpu_seconds(server) - before) / (time.monotonic() - began)
        assert not len(RunFiles(tmp_path / "run").rounds()["round"])  # all of it was within round 1
    record_property("share", share)
    print(f"\na waiting server takes {share:.1%} of a core")
    assert share < 0.05


@pytest.fixture
def without_mpi4py(tmp_path):
    """A PYTHONPATH under which mpi4py cannot be imported."""
    package = tmp_path / "shadow/mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ImportError('libmpi.so.40: cannot open shared object file')\n"
    )
    return os.pathsep.join([str(package.parent), process_environment()["PYTHONPATH"]])


@thorough
def test_without_mpi4py_one_process_trains(trained, tmp_path, without_mpi4py):
    ended = run_process(
        command_line("run", TINY, "output=run"), tmp_path, PYTHONPATH=without_mpi4py
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_run(trained(), tmp_path / "run")


@thorough
def test_without_mpi4py_a_launcher_is_refused_in_one_line(tmp_path, without_mpi4py):
    more = {"PYTHONPATH": without_mpi4py, "OMPI_COMM_WORLD_SIZE": "3"}
    ended = run_process(command_line("run", TINY, "output=run"), tmp_path, **more)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "mpi4py does not work: libmpi.so.40: cannot open" in package_lines(ended.stderr)[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_mpi4py_one_process_trains_and_a_launcher_is_refused(
    call, tmp_path, monkeypatch, error
):
    def broken():
        raise error("libmpi.so.40: cannot open")

    monkeypatch.setattr(comm, "_mpi4py", broken)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        with monkeypatch.context() as launcher:
            launcher.setenv(name, "3")
            code, _, err = call("run", TINY, "rounds=1", "output=run")
        assert code == 2 and package_lines(err) == err.splitlines() and len(err.splitlines()) == 1
        assert "mpi4py does not work: libmpi.so.40: cannot open" in err
        assert not list(tmp_path.iterdir())
    assert call("run", TINY, "rounds=1", "output=run")[0] == 0


def test_messages_of_more_items_than_mpi_counts_travel_in_parts(tmp_path):
    ended = run_process(
        [*mpirun_command(3), sys.executable, str(TESTS / "verbs.py"), "4"], tmp_path
    )
    assert (ended.returncode, ended.stdout) == (0, "well\n" * 3), ended.stderr


def assert_alone(code: int, err: str, name: str) -> None:
    """One line says that the others are not found."""
    assert code == 2 and package_lines(err) == err.splitlines() and len(package_lines(err)) == 1, (
        err
    )
    assert f"{name} = 3, but this process finds none of the others" in err


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launch_in_which_mpi_finds_one_rank_is_refused(name, call, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "Mpi", comm.Solo)
    monkeypatch.setenv(name, "3")
    code, _, err = call("run", TINY, "output=none")
    assert_alone(code, err, name)
    assert not list(tmp_path.iterdir())


@thorough
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_process_that_finds_no_other_of_its_job_is_refused(name, tmp_path):
    ended = run_process(command_line("run", TINY, "output=none"), tmp_path, **{name: "3"})
    assert_alone(ended.returncode, ended.stderr, name)
    assert not list(tmp_path.iterdir())


def test_variables_of_a_job_are_those_of_one_that_has_ended_when_its_server_is_gone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PMI", "OMPI_COMM", "MV2"))]:
        monkeypatch.delenv(name)
    assert not is_launched() and not has_leftovers()
    monkeypatch.setenv("PMIX_NAMESPACE", "gone")
    monkeypatch.setenv("PMIX_RANK", "0")
    assert not is_launched() and has_leftovers()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv(
            "PMIX_SERVER_URI41", f"prterun.0;tcp4://127.0.0.1:{server.getsockname()[1]}"
        )
        assert is_launched() and not has_leftovers()
    assert not is_launched() and has_leftovers()


def test_a_process_alone_of_two_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(
        ValueError, match="SLURM_NTASKS = 2, but this process finds none of the others"
    ):
        connect()


@thorough
def test_variables_of_a_job_that_has_ended_do_no_harm(tmp_path):
    ended = run_process(
        command_line("run", TINY, "rounds=1", "output=run"),
        tmp_path,
        PMIX_RANK="0",
        PMIX_NAMESPACE="gone",
    )
    assert (ended.returncode, ended.stdout) == (0, "run: done\n"), ended.stderr
