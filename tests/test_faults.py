"""A run that is killed, starved of disk or damaged anywhere: the same bits after a resume, or one
line with a name.
"""

import errno
import os
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faulty import AFTER, BEFORE, FAIL, WITHIN, ProcessResult, start_fork_server
from runs import (
    TESTS,
    command_line,
    kill_all,
    launch,
    mpirun_command,
    process_environment,
    run_process,
)

from fedlora_mpi.core.disk_errors import WriteError
from fedlora_mpi.federation.client_store import DiskRows

CONFIG = TESTS / "faulty.yaml"
# keeps one checkpoint, so that another is removed
RESUME = ["run", "--resume", CONFIG, "output=victim"]
SAID = ("fedlora-mpi: ", "round ", "hint: ", "resuming ", "skipped ")

thorough = pytest.mark.thorough
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists() or not shutil.which("cc"), reason="needs Linux, cc"
)


@pytest.fixture(scope="module")
def faulty():
    """What runs commands quickly, and breaks off where it is told to."""
    with start_fork_server(**process_environment()) as made:
        yield made


@pytest.fixture(scope="module")
def good(faulty, tmp_path_factory):
    """(the folder of a finished run with two checkpoints, its digest, every call of RESUME that
    changes something).
    """
    home = tmp_path_factory.mktemp("good")
    trace = faulty(*RESUME, cwd=home, under="victim").trace
    shutil.rmtree(home / "victim")
    ended = faulty("run", CONFIG, "output=victim", "checkpoint.keep=2", cwd=home)
    assert ended.code == 0, ended.err
    return home / "victim", digest(faulty, home), trace


def digest(faulty, home: Path) -> str:
    """What ``fedlora-mpi digest`` says of the run."""
    ended = faulty("digest", "victim", cwd=home)
    assert ended.code == 0, ended.err
    return ended.out


def is_told(ended: ProcessResult, name: str, codes=(1, 2)) -> str:
    """The one line of a command that could not do its work."""
    lines = [line for line in ended.err.splitlines() if line.startswith("fedlora-mpi: ")]
    strange = [line for line in ended.err.splitlines() if not line.startswith(SAID)]
    assert ended.code in codes and len(lines) == 1 and not strange and name in lines[0], ended
    return lines[0]


def resumed(faulty, home: Path, truth: str) -> ProcessResult:
    """``run --resume`` ends in the bits of ``truth``."""
    ended = faulty(*RESUME, cwd=home)
    assert ended.code == 0, ended
    assert digest(faulty, home) == truth
    report = faulty("report", "victim", cwd=home)
    assert report.code == 0 and report.err == "", report
    assert sorted(path.name for path in home.iterdir()) == ["victim"], (
        "something is left beside the run folder"
    )
    return ended


def some(number: int, every: int, seed: int = 1) -> list[int]:
    """So many of the calls, the first and the last among them."""
    return sorted({0, every - 1, *random.Random(seed).sample(range(every), number - 2)})


def kill_at(faulty, good, home: Path, calls, phases, ranks=1) -> list[float]:
    """Kill a run at these calls; it resumes to the same bits. Seconds of each resume."""
    _, truth, trace = good
    seconds = []
    for call in calls:
        for phase in phases:
            if phase == WITHIN and ranks == 1 and not trace[call].startswith("write"):
                continue
            killed = faulty(*RESUME, ranks=ranks, cwd=home, under="victim", call=call, phase=phase)
            assert killed.code == -9, (call, phase, killed)
            folder = home / "victim"
            assert not folder.exists() or {"config.yaml", "log.h5"} <= {
                path.name for path in folder.iterdir()
            }
            seconds.append(resumed(faulty, home, truth).seconds)
            shutil.rmtree(folder)
    return seconds


def test_a_run_killed_at_a_write_ends_in_the_same_bits(faulty, good, tmp_path):
    kill_at(faulty, good, tmp_path, some(4, len(good[2])), [BEFORE])


@thorough
def test_a_run_killed_at_several_writes_ends_in_the_same_bits(faulty, good, tmp_path):
    kill_at(faulty, good, tmp_path, some(8, len(good[2])), [BEFORE])
    kill_at(faulty, good, tmp_path, some(4, len(good[2]), seed=2), [WITHIN, AFTER])


@pytest.mark.parametrize("more", [2, pytest.param(8, marks=thorough)])
def test_a_start_killed_anywhere_makes_a_whole_folder_or_none(faulty, good, tmp_path, more):
    made = next(
        n for n, call in enumerate(good[2]) if call.startswith("rename") and call.endswith("victim")
    )
    for call in (*some(more, made), made, made + 1):
        assert faulty(*RESUME, cwd=tmp_path, under="victim", call=call, phase=BEFORE).code == -9
        assert (tmp_path / "victim").exists() == (call > made)
        again = faulty("resume", "victim", cwd=tmp_path)
        if call > made:
            assert again.code == 0, again
        else:
            is_told(again, "victim: not a run folder", [2])
            assert faulty("run", CONFIG, "output=victim", cwd=tmp_path).code == 0
        shutil.rmtree(tmp_path / "victim")


@thorough
def test_three_ranks_that_die_at_a_write_end_in_the_same_bits(faulty, good, tmp_path):
    every = len(faulty(*RESUME, ranks=3, cwd=tmp_path, under="victim").trace)
    assert every > len(good[2])  # more workers, more files
    shutil.rmtree(tmp_path / "victim")
    kill_at(faulty, good, tmp_path, some(4, every - 5), [BEFORE], ranks=3)


@pytest.mark.slow
def test_a_run_killed_at_every_write_fsync_and_rename_ends_in_the_same_bits(
    faulty, good, tmp_path, capsys
):
    # after one is before the next
    seconds = kill_at(faulty, good, tmp_path, range(len(good[2])), [BEFORE, WITHIN])
    seconds += kill_at(faulty, good, tmp_path, [len(good[2]) - 1], [AFTER])
    with capsys.disabled():
        print(
            f"\n{len(seconds)} kills at {len(good[2])} calls, resumed in {max(seconds):.2f} s at "
            "most"
        )


@pytest.mark.slow
def test_three_ranks_that_die_at_many_writes_end_in_the_same_bits(faulty, good, tmp_path):
    every = len(faulty(*RESUME, ranks=3, cwd=tmp_path, under="victim").trace)
    shutil.rmtree(tmp_path / "victim")
    kill_at(faulty, good, tmp_path, some(60, every - 5), [BEFORE, AFTER], ranks=3)


@pytest.mark.slow
def test_a_run_killed_at_200_random_moments_ends_in_the_same_bits(faulty, good, tmp_path, capsys):
    """Half of them kill what resumes too, twice in a row."""
    times, lost = random.Random(3), []
    whole = faulty(*RESUME, cwd=tmp_path).seconds
    shutil.rmtree(tmp_path / "victim")
    for moment in range(200):
        kills = [
            faulty(*RESUME, cwd=tmp_path, kill=times.uniform(0, whole)).code
            for _ in range(1 + 2 * (moment % 2))
        ]
        lost.append(resumed(faulty, tmp_path, good[1]).seconds)
        shutil.rmtree(tmp_path / "victim")
    with capsys.disabled():
        print(
            f"\n200 runs of {whole:.2f} s, resumed in {max(lost):.2f} s at most; the last codes "
            f"{kills}"
        )


@pytest.mark.slow
def test_ranks_under_mpirun_killed_at_random_moments_end_in_the_same_bits(faulty, good, tmp_path):
    times = random.Random(4)
    for _ in range(6):
        for _ in range(2):
            with launch([*mpirun_command(3), *command_line(*RESUME)], tmp_path) as job:
                time.sleep(times.uniform(4, 12))
                kill_all(job)
        ended = run_process([*mpirun_command(2), *command_line(*RESUME)], tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert digest(faulty, tmp_path) == good[1]
        shutil.rmtree(tmp_path / "victim")


# --- no room


def fill_at(faulty, good, home: Path, calls) -> None:
    """The disk is full from one of these calls on: one line with the file; the run goes on when
    there is room.
    """
    _, truth, trace = good
    for call in calls:
        ended = faulty(*RESUME, cwd=home, under="victim", call=call, phase=FAIL, error=errno.ENOSPC)
        if ended.code == 0:  # nothing that matters was still to be written
            assert call > len(trace) - 30, (call, trace[call])
        else:
            line = is_told(ended, "victim", codes=[2] if call == 0 else [1])
            assert "No space left on device" in line and ("free in " in line or call == 0)
        resumed(faulty, home, truth)
        shutil.rmtree(home / "victim")


@pytest.mark.parametrize("number", [4, pytest.param(14, marks=thorough)])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    faulty, good, tmp_path, number
):
    fill_at(faulty, good, tmp_path, some(number, len(good[2])))


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on_is_one_line(faulty, good, tmp_path):
    fill_at(faulty, good, tmp_path, range(len(good[2])))


@contextmanager
def mounted(folder: Path, options: str):
    """A small file system. Skips where one may not."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@thorough
def test_a_file_system_that_fills_up_and_is_given_room(faulty, good, tmp_path):
    with mounted(tmp_path / "small", "size=420k"):
        # no fork: its exit too
        ended = run_process(command_line(*RESUME[:3], "output=small/victim"), tmp_path)
        told = ProcessResult(ended.returncode, ended.stdout, ended.stderr, 0, [])
        assert "No space left on device, " in is_told(told, "small/victim", [1])
        subprocess.run(["mount", "-o", "remount,size=10m", tmp_path / "small"], check=True)
        ended = faulty("resume", "small/victim", cwd=tmp_path)
        assert ended.code == 0 and "resuming small/victim after round 1" in ended.err, ended
        assert digest(faulty, tmp_path / "small") == good[1]


@pytest.mark.slow
def test_a_file_system_that_fills_up_ends_all_ranks_with_code_1(tmp_path):
    with mounted(tmp_path / "small", "size=420k"):
        ended = run_process(
            [*mpirun_command(3), *command_line(*RESUME[:3], "output=small/victim")], tmp_path
        )
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert (
            len(
                [
                    line
                    for line in ended.stderr.splitlines()
                    if line.startswith("fedlora-mpi: small/victim")
                ]
            )
            == 1
        )


def test_personal_leaves_for_which_the_disk_has_no_room_are_one_line(tmp_path):
    with (
        mounted(tmp_path / "small", "size=64k"),
        pytest.raises(
            WriteError, match="small/personal leaves: cannot be written: No space left on device, "
        ),
    ):
        DiskRows(tmp_path / "small").allocate(100, torch.zeros(1000))


def test_a_file_system_that_may_only_be_read_is_one_line(faulty, good, tmp_path):
    with mounted(tmp_path / "disk", "size=10m"):
        shutil.copytree(good[0], tmp_path / "disk/victim")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        for line in (["resume", "disk/victim"], ["run", "--resume", CONFIG, "output=disk/victim"]):
            assert "Read-only file system" in is_told(
                faulty(*line, cwd=tmp_path), "disk/victim", [1]
            )
        new = faulty("run", CONFIG, "output=disk/new", cwd=tmp_path)
        assert "disk/new: cannot be created: Read-only file system" in is_told(new, "disk/new", [2])
        read = faulty("report", "disk/victim", cwd=tmp_path)
        assert (read.code, read.err) == (0, "") and digest(faulty, tmp_path / "disk") == good[1]


def test_a_folder_of_somebody_else_is_one_line(faulty, good, tmp_path):
    if os.geteuid():
        pytest.skip("needs to be root to become somebody else")
    shutil.copytree(good[0], tmp_path / "victim")
    for above in (tmp_path, *tmp_path.parents[:-1]):
        os.chmod(above, os.stat(above).st_mode | 0o055)
    strange = 65534
    assert "Permission denied" in is_told(
        faulty("resume", "victim", cwd=tmp_path, user=strange), "victim/", [1]
    )
    new = faulty("run", CONFIG, "output=new", cwd=tmp_path, user=strange)
    assert "cannot be created: Permission denied" in is_told(new, "output = new", [2])


# --- damage

COMMANDS = {
    "run --resume": [*RESUME, "checkpoint.keep=2"],
    "resume": ["resume", "victim"],
    "report": ["report", "victim"],
    "digest": ["digest", "victim"],
    "open_run": ["open_run", "victim"],
}


def damaged(content: bytes, dice: random.Random) -> bytes:
    """One bit turned over, mostly of a byte that is not zero; or the end cut off."""
    if dice.random() < 0.2:
        return content[: dice.randrange(len(content))]
    there = [at for at, byte in enumerate(content) if byte or dice.random() < 0.02]
    changed = bytearray(content)
    changed[dice.choice(there)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def damage(
    faulty, good, home: Path, times: int, seed: int, names=("*",), commands=COMMANDS
) -> dict[str, int]:
    """Damage one file of a finished run, then use the run: right, or the one before with a word, or
    one line.

    {how it ended: times}
    """
    folder, truth, _ = good
    files = sorted(
        path.relative_to(folder) for name in names for path in folder.rglob(name) if path.is_file()
    )
    files = [file for file in files if file.name != ".lock"]
    dice, ends = random.Random(seed), {"right": 0, "the checkpoint before": 0, "one line": 0}
    shutil.copytree(folder, home / "victim")
    whole = {name: faulty(*line, cwd=home) for name, line in commands.items()}
    for number in range(times):
        file = files[number % len(files)]
        content = damaged((folder / file).read_bytes(), dice)
        for name, line in commands.items():
            shutil.rmtree(home / "victim")
            shutil.copytree(folder, home / "victim")
            (home / "victim" / file).write_bytes(content)
            ended = faulty(*line, cwd=home)
            if ended.code:
                is_told(ended, file.name)
                ends["one line"] += 1
            elif "resume" in name:
                assert digest(faulty, home) == truth, (file, name, ended)
                ends["the checkpoint before" if "skipped" in ended.err else "right"] += 1
            else:
                passed_over = "skipped" in ended.err and str(file.parent) in ended.err
                assert ended.out == whole[name].out or passed_over, (file, name, ended)
                ends["the checkpoint before" if "skipped" in ended.err else "right"] += 1
    shutil.rmtree(home / "victim")
    return ends


def test_a_damaged_file_is_named_or_does_no_harm(faulty, good, tmp_path):
    two = {name: COMMANDS[name] for name in ("resume", "open_run")}
    ends = damage(faulty, good, tmp_path, 2, seed=1, commands=two)
    assert sum(ends.values()) == 4, ends


@thorough
def test_each_file_damaged_is_named_or_does_no_harm(faulty, good, tmp_path):
    two = {name: COMMANDS[name] for name in ("resume", "open_run")}
    ends = damage(faulty, good, tmp_path, 12, seed=1, commands=two)
    assert all(ends.values()), ends


@pytest.mark.slow
def test_a_file_damaged_in_many_ways_is_named_or_does_no_harm(faulty, good, tmp_path, capsys):
    ends = damage(faulty, good, tmp_path, 120, seed=2)
    with capsys.disabled():
        print(f"\n120 damages: {ends}")


@pytest.mark.slow
def test_a_log_damaged_in_many_ways_is_told(faulty, good, tmp_path, capsys):
    folder = shutil.copytree(
        good[0], tmp_path / "alone/victim", ignore=shutil.ignore_patterns("checkpoints")
    )
    only = {"report": COMMANDS["report"]}
    ends = damage(
        faulty, (folder, *good[1:]), tmp_path, 600, seed=3, names=("log.h5",), commands=only
    )
    with capsys.disabled():
        print(f"\n600 damaged logs: {ends}")
