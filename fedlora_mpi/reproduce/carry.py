"""Execute the runs of a grid: locally, several at a time, or as the lines of a Slurm array."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..core.units import format_seconds
from ..experiment import slurm
from ..mpi import launch
from ..store import nolinks
from .grid import Job


class Task(NamedTuple):
    """A process to start. Its output is appended to ``log``."""

    name: str
    command: Sequence[str]
    log: Path


def make_tasks(jobs: Sequence[Job], ranks: int) -> list[Task]:
    """The task of each run: start it, or resume it if its folder exists."""
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
    """Run all tasks, ``max_parallel`` at a time, and return the exit codes of those that failed.

    A failed task does not stop the others. ``gpus`` are values of CUDA_VISIBLE_DEVICES; the
    parallel slots take them in turn. If this process is interrupted, its tasks are terminated.
    """
    waiting, failed = list(enumerate(all_tasks, 1)), {}
    running: dict[int, tuple[int, Task, subprocess.Popen, float]] = {}  # slot -> ...
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
    """A shell command for each run, which starts it, or resumes it if its folder exists.

    ``exec`` replaces the shell, so that signals to the shell reach the run.
    """
    return [
        f"exec {shlex.join([*launch.launch_command(ranks), *_run_arguments(job)])}" for job in jobs
    ]


def array_script(name: str, count: int, ranks: int, lines_file: Path, folder: Path) -> str:
    """An sbatch script of an array job whose task n runs line n of ``lines_file``."""
    job = slurm.Job(name=name, log=f"{folder}/slurm-%A_%a.log", ranks=ranks, array=count)
    return slurm.sbatch_script(job, slurm.array_task_lines(shlex.quote(str(lines_file))))


def _run_arguments(job: Job) -> list[str]:
    return ["run", "--resume", str(job.sibling_path(".yaml"))]


def _start_process(task: Task, extra_env: Mapping[str, str]) -> subprocess.Popen:
    # without SLURM_NTASKS, or the new process would take itself for a task of this Slurm job
    env = {name: value for name, value in os.environ.items() if name != "SLURM_NTASKS"}
    env |= extra_env
    with open(nolinks.open_handle(task.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
        )


def _end_process(process: subprocess.Popen) -> None:
    """Terminate the process if it still runs. Its last checkpoint is safe."""
    if process.poll() is None:
        process.terminate()
        process.wait()
