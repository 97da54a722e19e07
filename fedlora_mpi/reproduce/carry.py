"""Execute the runs of a grid: locally, several at a time, or as the lines of a Slurm array."""

import shlex
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.units import format_seconds
from ..experiment import slurm
from ..experiment.processes import Pool, Slots, Task
from ..mpi import launch
from .grid import Job


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
    waiting, failed = deque(all_tasks), {}
    number_of = {task.name: number for number, task in enumerate(all_tasks, 1)}
    with Pool(Slots(max_parallel, gpus)) as pool:
        while waiting or pool.tasks:
            while waiting and pool.has_room:
                pool.start(waiting.popleft())
            time.sleep(0.05)
            for task, code, seconds in pool.collect_ended():
                state = "done" if code == 0 else f"exit code {code}, see {task.log}"
                report(
                    f"[{number_of[task.name]}/{len(all_tasks)}] {task.name}: {state} after "
                    f"{format_seconds(seconds)}"
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
