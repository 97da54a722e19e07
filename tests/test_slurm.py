"""Slurm: what the scripts say, what ``submit`` refuses, and jobs on a real cluster that are stopped
and go on.
"""

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from cluster import slurm_cluster
from runs import (
    SLOW,
    TESTS,
    TINY,
    assert_same_run,
    command_line,
    last_checkpoint,
    process_environment,
    run_process,
    wait_until,
)

from fedlora_mpi.cli import main
from fedlora_mpi.experiment.slurm import Job, sbatch_script
from fedlora_mpi.reproduce import carry

ROOT = TESTS.parent
MAKE = runpy.run_path(str(ROOT / "jobs/make.py"))


def submitted(*arguments, env=None, cwd=ROOT):
    return run_process(command_line("submit", *arguments), cwd, **(env or process_environment()))


# --- the scripts


@pytest.mark.parametrize("name", MAKE["JOBS"])
def test_the_scripts_of_the_folder_are_those_of_the_one_source(name):
    text = (ROOT / f"jobs/{name}.sbatch").read_text()
    assert text == MAKE["made"](name), "python jobs/make.py writes them anew"
    assert re.search(r"^##SBATCH --account=ACCOUNT --partition=PARTITION$", text, re.MULTILINE)
    assert re.search(r"^(run|jobs)=", text, re.MULTILINE)
    for option in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert re.search(rf"^#SBATCH .*{option}\b", text, re.MULTILINE), option
    assert ("MPS=yes" in text) == (name in ("gpus", "nodes"))


def test_every_script_of_the_folder_is_listed():
    assert {path.stem for path in (ROOT / "jobs").glob("*.sbatch")} == set(MAKE["JOBS"])


@pytest.mark.parametrize("name", MAKE["JOBS"])
def test_a_script_is_right_for_bash(name):
    assert subprocess.run(["bash", "-n", ROOT / f"jobs/{name}.sbatch"]).returncode == 0


@pytest.mark.parametrize(
    "program, code, requeued",
    [
        ("exit 0", 0, False),
        ("exit 2", 2, False),
        ("exit 75", 75, True),
        ("kill -USR1 $BASHPID", 138, True),
    ],
)
def test_a_job_is_queued_again_only_when_it_was_told_to_stop(program, code, requeued, tmp_path):
    assert ended(f"( {program} )", tmp_path).returncode == code
    assert (tmp_path / "asked").exists() == requeued


def test_the_signal_reaches_the_program_and_its_own_code_counts(tmp_path):
    program = (
        "python3 -c 'import os, signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: "
        "(time.sleep(0.5), sys.exit(75)))\n"
    )
    program += "os.kill(os.getppid(), signal.SIGUSR1)\ntime.sleep(20)'"
    assert (
        ended(program, tmp_path, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3").returncode == 75
    )
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n"


@pytest.mark.parametrize("status, code, requeued", [(0, 0, False), (75, 75, True), (2, 2, False)])
def test_a_run_that_was_cut_short_is_queued_again_though_mpirun_says_0(
    status, code, requeued, tmp_path
):
    assert ended("true", tmp_path, is_done=f"(exit {status})").returncode == code
    assert (tmp_path / "asked").exists() == requeued


def test_a_script_asks_for_the_run_that_it_has_started(capsys):
    assert main(["submit", str(TINY), "seed=3", "--dry-run"]) == 0
    assert f"python -m fedlora_mpi status {TINY} seed=3; code=$?" in capsys.readouterr().out
    text = (ROOT / "jobs/nodes.sbatch").read_text()
    assert 'python -m fedlora_mpi status "${run[@]}"; code=$?' in text and "run=$!" not in text


def ended(program, folder, is_done="true", **env):
    """A script's end on a machine whose scontrol writes down what it is asked."""
    (folder / "bin").mkdir()
    (folder / "bin/scontrol").write_text(f'#!/bin/bash\necho "$@" >> {folder}/asked\n')
    (folder / "bin/scontrol").chmod(0o755)
    text = sbatch_script(
        Job(name="x", log="x", ranks=1),
        program,
        bin_folder=str(folder / "bin"),
        done_command=is_done,
    )
    return run_process(["bash", "-c", text], folder, SLURM_JOB_ID="5", **env)


# --- submit


def test_a_dry_run_prints_the_script(capsys):
    asked = ["submit", str(TINY), "seed=3", "--nodes", "2", "--gpus", "2", "--time", "1-00:00:00"]
    assert main([*asked, "--partition", "gpu", "--account", "me", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --account=me --partition=gpu\n" in text and "--time=1-00:00:00 " in text
    assert (
        "#SBATCH --nodes=2 --ntasks-per-node=3 --ntasks=6 " in text
        and "#SBATCH --gpus-per-node=2\n" in text
    )
    # 4 GPUs and the server
    assert f"mpirun -n 5 python -m fedlora_mpi run --resume {TINY} seed=3 &\n" in text


def test_memory_qos_and_features_are_asked_for(capsys):
    asked = ["--mem", "64G", "--qos", "long", "--constraint", "a100|h100", "--dry-run"]
    assert main(["submit", str(TINY), *asked]) == 0
    text = capsys.readouterr().out
    assert '#SBATCH --mem=64G --qos=long --constraint="a100|h100"\n' in text
    assert main(["submit", str(TINY), "--qos=long", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --qos=long\n" in text and "--mem" not in text


def test_overrides_stand_before_between_and_after_options(capsys):
    words = ["seed=3", "--gpus", "2", "rounds=5", "--time", "1:00:00", "train.lr=0.1", "--dry-run"]
    assert main(["submit", str(TINY), *words, "output=x"]) == 0
    line = f"run --resume {TINY} seed=3 rounds=5 train.lr=0.1 output=x &\n"
    assert line in capsys.readouterr().out
    assert main(["submit", "--gpus", "2", str(TINY), "seed=3", "--dry-run"]) == 0
    assert f"run --resume {TINY} seed=3 &\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "output, word", [("runs/a", "runs/a.slurm-%j.log"), ("my runs/a", '"my runs/a.slurm-%j.log"')]
)
def test_the_output_is_one_word_of_the_script(output, word, capsys):
    assert main(["submit", str(TINY), f"output={output}", "--dry-run"]) == 0
    assert f"#SBATCH --output={word}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, ranks",
    [((), 8), (("--ranks", "3"), 3), (("server_hosts_clients=true",), 7), (("--gpus", "4"), 5)],
)
def test_the_ranks_are_chosen_by_gpus_and_clients(given, ranks, capsys):
    overrides = [word for word in given if "=" in word]
    assert (
        main(["submit", str(TINY), *overrides, *(w for w in given if "=" not in w), "--dry-run"])
        == 0
    )
    assert f"--ntasks={ranks} " in capsys.readouterr().out  # tiny.yaml has 7 clients


@pytest.mark.parametrize(
    "given, said",
    [
        (("--time", "soon"), "--time = soon: must be minutes, HH:MM:SS or D-HH:MM:SS"),
        (("--nodes", "0"), "--nodes = 0: must be"),
        (("--nodes", "3", "--ranks", "2"), "--ranks = 2: must be at least one for each of 3 nodes"),
        (("--partition", "a\nrm"), "--partition = 'a\\nrm': must be a name"),
        (("--qos", "a b"), "--qos = 'a b': must be a name"),
        (("--mem", "much"), "--mem = much: must be an integer with K, M, G or T"),
        (("--constraint", "a\n#"), "--constraint = 'a\\n#': must be features of nodes"),
    ],
)
def test_what_slurm_could_not_grant_is_refused(given, said, capsys):
    assert main(["submit", str(TINY), *given, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedlora-mpi: {said}") and error.count("\n") == 1


def test_a_mistake_in_the_config_shows_before_anything_is_queued(capsys):
    assert main(["submit", str(TINY), "train.lr=-1", "--dry-run"]) == 2
    assert "command line: train.lr = -1" in capsys.readouterr().err


def test_without_slurm_submit_says_so_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = call("submit", TINY)
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert err.startswith("fedlora-mpi: no sbatch on PATH: ") and err.count("\n") == 1


# --- run --resume


def test_run_resume_starts_goes_on_and_then_has_nothing_to_do(trained, tmp_path, capsys):
    parts = tmp_path / "parts"
    for rounds in (2, 4, 4):
        assert main(["run", "--resume", str(TINY), f"output={parts}", f"rounds={rounds}"]) == 0
    assert f"resuming {parts} after round 2" in capsys.readouterr().err
    assert_same_run(trained(), parts)


def test_run_resume_refuses_a_folder_with_other_settings(copied, call):
    folder = copied()
    said = (
        f"fedlora-mpi: {TINY}: train.lr = 0.1: the run in {folder} has 0.05; choose another "
        "output\n"
    )
    assert call("run", "--resume", TINY, f"output={folder}", "train.lr=0.1") == (2, "", said)


# --- a real cluster


# no checkpoint but those of a stop and of the end
LONG = ["rounds=12", "checkpoint.every=100", SLOW]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running cluster."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs Linux's /proc")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["run", str(TINY), *LONG, f"output={folder}"]) == 0
    return folder


def queued(slurm, home: Path, *arguments: str, output: str = "run", pause: str = "0.05") -> str:
    """The number of a job of ``submit`` in the folder ``home``."""
    done = submitted(
        TINY, *LONG, f"output={output}", *arguments, env=slurm.env | {"TEST_PAUSE": pause}, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return re.match(r"job (\d+): ", done.stdout)[1]


def digests(*folders: Path) -> list[str]:
    """What ``fedlora-mpi digest`` says of runs, without their names."""
    done = run_process(command_line("digest", *folders), ROOT)
    assert done.returncode == 0, done.stderr
    return [
        line.removeprefix(f"{folder} ")
        for folder, line in zip(folders, done.stdout.splitlines(), strict=True)
    ]


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_twice_goes_on_to_the_same_bits(slurm, undisturbed, tmp_path):
    number = queued(slurm, tmp_path, "--ranks", "2", "--time", "60", output='my "own"/run')
    folder = tmp_path / 'my "own"/run'
    log = folder.with_name(f"run.slurm-{number}.log")
    for stop in (1, 2):
        before = last_checkpoint(folder)
        wait_until(
            lambda before=before: (
                log.exists() and f"round {before + 2}/12 " in log.read_text(errors="replace")
            ),
            200,
        )
        slurm.run_command("scancel", "--batch", "--signal=USR1", number)
        wait_until(lambda stop=stop: slurm.job_info(number)["Restarts"] == str(stop), 100)
        assert before < last_checkpoint(folder) < 12
    job = slurm.wait_for_job(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2"), (
        log.read_text()
    )
    text = log.read_text()
    assert text.count(
        f"resuming {folder.relative_to(tmp_path)} after round"
    ) == 2 and text.rstrip().endswith("run: done")
    one, other = digests(folder, undisturbed)
    assert one == other
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_job_whose_time_is_nearly_up_goes_on_in_a_second_one(slurm, undisturbed, tmp_path):
    # SIGUSR1 after a minute
    number = queued(slurm, tmp_path, "--ranks", "1", "--time", "3", pause="0.25")
    wait_until(lambda: slurm.job_info(number)["Restarts"] == "1", 180)
    assert 0 < last_checkpoint(tmp_path / "run") < 12
    assert slurm.wait_for_job(number)["JobState"] == "COMPLETED"
    one, other = digests(tmp_path / "run", undisturbed)
    assert one == other


@pytest.mark.slow
def test_a_task_of_an_array_is_queued_again_without_the_others(slurm, undisturbed, tmp_path):
    lines = [
        f"exec {shlex.join(command_line('run', '--resume', TINY, *LONG, f'output=run-{n}'))}\n"
        for n in (1, 2)
    ]
    (tmp_path / "jobs.txt").write_text("".join(lines))
    (tmp_path / "array.sbatch").write_text(
        carry.array_script("tests", 2, 1, tmp_path / "jobs.txt", tmp_path)
    )
    line = ["sbatch", "--parsable", "array.sbatch"]
    number = slurm.run_command(*line, cwd=tmp_path, TEST_PAUSE="0.1").strip()
    log = tmp_path / f"slurm-{number}_2.log"
    wait_until(lambda: log.exists() and "round 2/12 " in log.read_text(errors="replace"), 200)
    slurm.run_command("scancel", "--batch", "--signal=USR1", f"{number}_2")
    jobs = [slurm.wait_for_job(f"{number}_{task}") for task in (1, 2)]
    assert [(job["JobState"], job["Restarts"]) for job in jobs] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
    ]
    one, two, other = digests(tmp_path / "run-1", tmp_path / "run-2", undisturbed)
    assert one == two == other
