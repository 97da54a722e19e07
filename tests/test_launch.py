"""``--ranks`` starts the right launcher, and Ctrl-C stops a run between rounds, or at once."""

import os
import signal
import sys
import threading

import pytest
from runs import TINY, assert_same_run, command_line, last_checkpoint, launch, wait_until

from fedlora_mpi.experiment.progress import Progress
from fedlora_mpi.mpi import local_ranks
from fedlora_mpi.mpi.comm import Solo

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_NTASKS")


pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """``launcher(text)``: a shell script mpirun beside this Python; None: there is none."""
    for name in (*LAUNCHED, "OMPI_ALLOW_RUN_AS_ROOT", "PRTE_MCA_rmaps_default_mapping_policy"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(
        local_ranks.launch_command.__globals__["shutil"], "which", lambda name: None
    )

    def write(text):
        (folder / "mpirun").write_text(f"#!/bin/bash\ncd {tmp_path}\n{text}\n")
        (folder / "mpirun").chmod(0o755)
        return str(folder / "mpirun")

    return write


def test_ranks_starts_the_same_command_under_the_launcher_beside_this_python(
    call, launcher, tmp_path
):
    launcher('printf "%s\\n" "$@" > asked; env > env; exit 7')
    arguments = ["run", TINY, "seed=3", "--ranks", "3", "--resume", "output=x"]
    assert call(*arguments) == (7, "", "")
    program = [str(tmp_path / "bin/python"), "-m", "fedlora_mpi"]
    rest = ["run", "--resume", "--ranks", "3", "--", str(TINY), "seed=3", "output=x"]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["-n", "3", "--bind-to", "none", *program, *rest]
    env = (tmp_path / "env").read_text().splitlines()
    assert "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe" in env
    assert ("OMPI_ALLOW_RUN_AS_ROOT=1" in env) == (os.geteuid() == 0)
    call("run", TINY, "--ranks", "2", "faults.tolerate=true")
    assert (tmp_path / "asked").read_text().splitlines()[:4] == ["--with-ft", "ulfm", "-n", "2"]


def test_resume_starts_ranks_too_and_a_user_s_own_setting_stays(
    call, launcher, copied, tmp_path, monkeypatch
):
    run = copied()
    launcher('printf "%s\\n" "$@" > asked; env > env')
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", "node")
    monkeypatch.setenv("PMIX_NAMESPACE", "gone")  # of a job that has ended
    assert call("resume", "--ranks", "2", run, "rounds=5")[0] == 0
    rest = ["resume", "--ranks", "2", "--", str(run), "rounds=5"]
    assert (tmp_path / "asked").read_text().splitlines()[-6:] == rest
    env = (tmp_path / "env").read_text()
    assert "mapping_policy=node\n" in env and "PMIX_NAMESPACE" not in env


def test_what_ranks_cannot_do_is_one_line_before_anything_starts(call, launcher, tmp_path):
    for arguments, text in (
        (["--ranks", "3"], "--ranks = 3: no mpirun beside "),
        (["--ranks", "0"], "--ranks = 0: must be an integer of at least 1"),
        (["--ranks", "3", "train.lr=-1"], "command line: train.lr = -1.0: must be"),
    ):
        code, out, err = call("run", TINY, *arguments)
        assert (code, out) == (2, "") and err.startswith(f"fedlora-mpi: {text}")
        assert err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_other_ranks_than_were_launched_are_refused_and_one_rank_is_this_process(
    call, launcher, monkeypatch
):
    assert call("run", TINY, "--ranks", "1", "rounds=1")[:2] == (0, "run: done\n")
    local_ranks.check_ranks(3, 3)
    with pytest.raises(ValueError, match="--ranks = 2: a launcher has started 3 already"):
        local_ranks.check_ranks(2, 3)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setattr("fedlora_mpi.mpi.comm.Mpi", Solo)
    code, _, err = call("run", TINY, "--ranks", "3")
    assert code == 2 and "a launcher has started 1 already" in err


def test_ctrl_c_asks_the_ranks_to_stop_and_a_second_one_ends_them(call, launcher, tmp_path):
    launcher(
        "trap 'echo asked > usr1' USR1; trap 'exit 1' TERM; touch up; while :; do sleep 0.02; done"
    )

    def interrupt():
        for file in ("up", "usr1"):
            wait_until((tmp_path / file).exists, 30)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, out, err = call("run", TINY, "--ranks", "2")
    thread.join()
    assert (code, out, err) == (130, "", "")  # the first line goes to stream 2 itself
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(times, round_)``: Ctrl-C so often when a round is logged."""

    def arm(times, round_):
        show = Progress.show

        def show_and_interrupt(self, number, row):
            show(self, number, row)
            for _ in range(times if number == round_ else 0):
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Progress, "show", show_and_interrupt)

    return arm


def test_ctrl_c_stops_after_the_round_with_a_checkpoint_and_says_how_to_go_on(
    call, interrupted, trained, tmp_path
):
    interrupted(1, 1)
    code, out, _ = call("run", TINY)
    text = "run: stopped after round 1; continue with 'fedlora-mpi resume run'\n"
    assert (code, out) == (75, text) and last_checkpoint(tmp_path / "run") == 1
    assert call("resume", "run")[0] == 0
    assert_same_run(trained(), tmp_path / "run")


@pytest.mark.parametrize(
    "round_, lost",
    [
        (1, "rounds 1 to 2 are lost, there is no checkpoint yet"),
        (3, "rounds 3 to 4 are lost, the newest checkpoint is of round 2"),
    ],
)
def test_a_second_ctrl_c_stops_at_once_and_says_what_is_lost(
    round_, lost, call, interrupted, tmp_path
):
    interrupted(2, round_)
    code, out, err = call("run", TINY)
    line = f"fedlora-mpi: run: stopped at once; {lost}; continue with 'fedlora-mpi resume run'"
    assert (code, out) == (130, "") and err.splitlines()[-1] == line
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.thorough  # two ranks
def test_ctrl_c_stops_real_ranks_between_rounds(tmp_path):
    line = command_line("run", TINY, "--ranks", "2", "rounds=1000", "output=run")
    with launch(line, tmp_path) as job:
        wait_until(lambda: (tmp_path / "run/log.h5").exists(), process=job)
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=120)
    assert job.returncode == 75 and "run: stopped after round " in out
    assert "fedlora-mpi: stopping at the end of this round" in err
    assert last_checkpoint(tmp_path / "run") >= 1
