"""Real ranks under mpirun: the same bits as one process, whatever is killed, stopped or wrong on the way.

Every launch costs seconds, so tests share them.
"""

import json
import os
import re
import signal
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
    command,
    committed,
    cpu_seconds,
    environment,
    finished,
    kill_all,
    launched,
    mpirun,
    ranks_of,
    said,
    until,
)

from fedlora_mpi.cli import main
from fedlora_mpi.comm import connect
from fedlora_mpi.store.reader import RunFiles

LONG = ["rounds=10", "checkpoint.every=1", SLOW]
PAUSE = {"TEST_PAUSE": "0.01"}  # seconds a step: a round of LONG takes a third of a second on 3 ranks
VARIANTS = {"fedlora": ["algorithm=fedlora"], "local": ["algorithm=local"]}
HOSTING = {**VARIANTS, "hosting": ["server_hosts_clients=true"]}

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def several(
    ranks: int, commands: list, cwd: Path, **env: str
) -> tuple[list[list[int]], subprocess.CompletedProcess]:
    """([ranks][commands] exit codes, the launcher's end)."""
    line = [*mpirun(ranks), sys.executable, str(TESTS / "several.py"), "codes", json.dumps(commands)]
    ended = finished(line, cwd, **env)
    codes = [json.loads((cwd / f"codes-{rank}").read_text()) for rank in range(ranks)]
    return codes, ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Finished runs of this process: fedlora, local and long."""
    home = tmp_path_factory.mktemp("alone")
    for name, overrides in {**VARIANTS, "long": LONG}.items():
        assert main(["run", str(TINY), *overrides, f"output={home / name}"]) == 0
    return home


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


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_number_of_ranks_gives_the_bits_of_one_process(alone, spread, ranks, name):
    assert_same_run(alone / name, spread(ranks) / name)


def test_a_server_that_hosts_clients_gives_the_same_bits(alone, spread):
    assert_same_run(alone / "fedlora", spread(3) / "hosting")
    shards = (spread(3) / "hosting/checkpoints/000004").glob("worker-*.h5")
    assert sorted(f.name for f in shards) == [f"worker-{rank:04d}.h5" for rank in (0, 1, 2)]


def test_only_rank_zero_speaks_and_a_log_says_what_mpi_was_handed(spread):
    log = RunFiles(spread(3) / "fedlora").rounds()
    upload = log["bytes_up"] / 4 / 4  # numbers of one client
    assert (log["bytes_mpi"] == 3 * 2 * 8 * (upload + 6)).all()  # 3 ranks, 2 int64 a number, 6 metrics


def test_a_job_killed_on_3_then_2_then_1_ranks_ends_on_4_with_the_same_bits(alone, tmp_path):
    line = ["run", str(TINY), *LONG, "output=long"]
    for ranks, kill_after in ((3, 2), (2, 4), (1, 6)):
        launcher = mpirun(ranks) if ranks > 1 else []
        with launched([*launcher, *command(*line)], tmp_path, **PAUSE) as job:
            until(lambda least=kill_after: committed(tmp_path / "long") >= least, process=job)
            if ranks > 1:
                assert sorted(ranks_of(job.pid)) == list(range(ranks))
                kill_all(job)
            else:
                job.kill()
            assert job.wait() != 0
        assert kill_after <= committed(tmp_path / "long") < 10
        line = ["resume", "long"]
    ended = finished([*mpirun(4), *command(*line)], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(alone / "long", tmp_path / "long")


def test_sigusr1_stops_all_ranks_at_a_round_with_a_checkpoint_and_code_75(alone, tmp_path):
    arguments = json.dumps([["run", str(TINY), *LONG, "checkpoint.every=100", "output=long"]])
    line = [*mpirun(2), sys.executable, str(TESTS / "several.py"), "codes", arguments]
    with launched(line, tmp_path, **PAUSE) as job:
        until(lambda: (tmp_path / "long/log.h5").exists(), process=job)
        until(lambda: len(RunFiles(tmp_path / "long").rounds()["round"]), process=job)
        assert committed(tmp_path / "long") == 0
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
        assert job.returncode != 0
    assert [json.loads((tmp_path / f"codes-{rank}").read_text()) for rank in range(2)] == [[75]] * 2
    rows = RunFiles(tmp_path / "long").rounds()["round"]
    assert 0 < committed(tmp_path / "long") == rows[-1] < 10
    ended = finished(command("resume", "long", "checkpoint.every=1"), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(alone / "long", tmp_path / "long")


def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path):
    line = command("run", TINY, "algorithm=user_parts:FailsOnRank2", "output=run")
    with launched([*mpirun(3), *line], tmp_path) as job:
        until(lambda: (tmp_path / "run/log.h5").exists(), process=job)
        began = time.monotonic()
        _, text = job.communicate(timeout=120)
        assert time.monotonic() - began < 20
    assert job.returncode not in (0, 2, 75)
    assert "[rank 2 of 3] stopped all ranks:" in text
    assert text.count("Traceback (most recent call last)") == 1
    assert 'KeyError: "a mistake in the user\'s upload"' in text and "user_parts.py" in text
    assert not ranks_of(job.pid)


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """One launch on 3 ranks: a mistake in the config, one that only the data shows, and a loss that explodes."""
    home = tmp_path_factory.mktemp("refused")
    mistakes = (["train.lr=-1"], ["data.partition.minimum=100"], ["train.lr=1e30"])
    commands = [["run", str(TINY), *more, f"output=run-{i}"] for i, more in enumerate(mistakes)]
    return home, *several(3, commands, home)


def test_a_mistake_is_one_line_and_code_2_on_all_ranks_and_leaves_no_folder(refused):
    home, codes, ended = refused
    assert [each[:2] for each in codes] == [[2, 2]] * 3
    lines = said(ended.stderr)
    assert lines[0].startswith("fedlora-mpi: command line: train.lr = -1.0: must be")
    assert lines[1].startswith(f"fedlora-mpi: {TINY}: data.partition.clients = 7: ")
    assert not (home / "run-0").exists() and not (home / "run-1").exists()
    assert "Traceback" not in ended.stderr


def test_a_loss_that_is_not_finite_ends_all_ranks_with_round_and_clients(refused):
    home, codes, ended = refused
    assert [each[2] for each in codes] == [1] * 3 and ended.returncode != 0
    assert len(said(ended.stderr)) == 3  # one line for each of the three commands
    assert re.search(r"round 1: the loss or upload of client \d(, \d)* is not finite", said(ended.stderr)[2])
    assert not committed(home / "run-2") and not len(RunFiles(home / "run-2").rounds()["round"])


def test_a_waiting_server_leaves_its_core_to_others(tmp_path, record_property):
    line = command("run", TINY, *LONG, "output=run")
    with launched([*mpirun(2), *line], tmp_path, TEST_PAUSE="0.5") as job:
        until(lambda: (tmp_path / "run/log.h5").exists(), process=job)
        server = ranks_of(job.pid)[0]
        time.sleep(0.5)  # it has begun to wait
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
    return os.pathsep.join([str(package.parent), environment()["PYTHONPATH"]])


def test_without_mpi4py_one_process_trains(alone, tmp_path, without_mpi4py):
    ended = finished(command("run", TINY, "output=run"), tmp_path, PYTHONPATH=without_mpi4py)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(alone / "fedlora", tmp_path / "run")


def test_without_mpi4py_a_launcher_is_refused_in_one_line(tmp_path, without_mpi4py):
    more = {"PYTHONPATH": without_mpi4py, "OMPI_COMM_WORLD_SIZE": "3"}
    ended = finished(command("run", TINY, "output=run"), tmp_path, **more)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "mpi4py does not work: libmpi.so.40: cannot open" in said(ended.stderr)[0]
    assert not (tmp_path / "run").exists()


def test_messages_of_more_items_than_mpi_counts_travel_in_parts(tmp_path):
    ended = finished([*mpirun(3), sys.executable, str(TESTS / "verbs.py"), "4"], tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "well\n" * 3), ended.stderr


def test_a_process_that_finds_no_other_of_its_job_is_refused(tmp_path):
    for name in ("SLURM_NTASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        ended = finished(command("run", TINY, "output=none"), tmp_path, **{name: "3"})
        assert ended.returncode == 2 and said(ended.stderr) == ended.stderr.splitlines(), ended.stderr
        assert f"{name} = 3, but this process finds none of the others" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_process_alone_of_two_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match="SLURM_NTASKS = 2, but this process finds none of the others"):
        connect()


def test_variables_of_a_job_that_has_ended_do_no_harm(tmp_path):
    ended = finished(command("run", TINY, "rounds=1", "output=run"), tmp_path, PMIX_RANK="0", PMIX_NAMESPACE="gone")
    assert (ended.returncode, ended.stdout) == (0, "run: done\n"), ended.stderr
