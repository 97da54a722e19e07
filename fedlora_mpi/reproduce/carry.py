"""Carry out the runs of a grid: here, several at a time, or as the lines of a Slurm array."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..core.units import format_seconds
from ..mpi import launch
from ..run import slurm
from ..store import nolinks
from .grid import Job


class Task(NamedTuple):
    """A process to start, its output to be added to ``log``."""

    name: str
    command: Sequence[str]
    log: Path


def make_tasks(jobs: Sequence[Job], ranks: int) -> list[Task]:
    """Start each run, or go on with it when its folder is there."""
    launcher = launch.launch_command(ranks)
    return [
        Task(job.name, [*launcher, *_run_arguments(job)], job.sibling_path(".log")) for job in jobs
    ]


def run_tasks(
    all_tasks: Sequence[Task],
    max_parallel: int,
    report: Callable[[str], None],
    gpus: Sequence[str] = (),
) -> dict[str, int]:
    """Run all tasks, ``max_parallel`` at a time; returns the exit codes of those that failed.

    A failure stops no other task. gpus: values of CUDA_VISIBLE_DEVICES, dealt to the places in
    turn. When this process is interrupted its tasks are ended.
    """
    waiting, failed = list(enumerate(all_tasks, 1)), {}
    running: dict[int, tuple[int, Task, subprocess.Popen, float]] = {}  # place -> ...
    with ExitStack() as cleanup:
        while waiting or running:
            for slot in range(max_parallel):
                if waiting and slot not in running:
                    number, task = waiting.pop(0)
                    process = _start_process(
                        task, {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                    )
                    cleanup.callback(_end_process, process)
                    running[slot] = number, task, process, time.monotonic()
            time.sleep(0.05)
            for slot, (number, task, process, started) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[slot]
                state = "done" if code == 0 else f"exit code {code}, see {task.log}"
                report(
                    f"[{number}/{len(all_tasks)}] {task.name}: {state} after "
                    f"{format_seconds(time.monotonic() - started)}"
                )
                if code:
                    failed[task.name] = code
    return failed


def shell_lines(jobs: Sequence[Job], ranks: int) -> list[str]:
    """A shell command for each run, which starts it, or goes on with it when its folder is there.

    ``exec``: the process that is started gets the signals of the one that reads the line.
    """
    return [
        f"exec {shlex.join([*launch.launch_command(ranks), *_run_arguments(job)])}" for job in jobs
    ]


def array_script(name: str, count: int, ranks: int, lines_file: Path, folder: Path) -> str:
    """An sbatch script that runs line n of ``lines_file`` as task n of an array."""
    job = slurm.Job(name=name, log=f"{folder}/slurm-%A_%a.log", ranks=ranks, array=count)
    return slurm.sbatch_script(job, slurm.array_task_lines(shlex.quote(str(lines_file))))


def _run_arguments(job: Job) -> list[str]:
    return ["run", "--resume", str(job.sibling_path(".yaml"))]


def _start_process(task: Task, extra_env: Mapping[str, str]) -> subprocess.Popen:
    # not one of its tasks
    env = {name: value for name, value in os.environ.items() if name != "SLURM_NTASKS"}
    env |= extra_env
    with open(nolinks.open_handle(task.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
        )


def _end_process(process: subprocess.Popen) -> None:
    """End a process that still runs; its last checkpoint is safe."""
    if process.poll() is None:
        process.terminate()
        process.wait()
