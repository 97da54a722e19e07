"""Carry out the runs of a grid: here, several at a time, or as the lines of a Slurm array."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..core.units import duration
from ..mpi import launch
from ..run import slurm
from ..store import nolinks
from .grid import Job


class Task(NamedTuple):
    """A process to start, its output to be added to ``log``."""

    name: str
    command: Sequence[str]
    log: Path


def tasks(jobs: Sequence[Job], ranks: int) -> list[Task]:
    """Start each run, or go on with it when its folder is there."""
    start = launch.command(ranks)
    return [Task(job.name, [*start, *_run(job)], job.beside(".log")) for job in jobs]


def work(
    todo: Sequence[Task], at_once: int, say: Callable[[str], None], gpus: Sequence[str] = ()
) -> dict[str, int]:
    """Run all tasks, ``at_once`` of them at a time; returns the exit codes of those that did not
    end well.

    A failure stops no other task. gpus: values of CUDA_VISIBLE_DEVICES, dealt to the places in
    turn. When this process is interrupted its tasks are ended.
    """
    waiting, failed = list(enumerate(todo, 1)), {}
    running: dict[int, tuple[int, Task, subprocess.Popen, float]] = {}  # place -> ...
    with ExitStack() as ends:
        while waiting or running:
            for place in range(at_once):
                if waiting and place not in running:
                    number, task = waiting.pop(0)
                    process = _start(
                        task, {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
                    )
                    ends.callback(_end, process)
                    running[place] = number, task, process, time.monotonic()
            time.sleep(0.05)
            for place, (number, task, process, began) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[place]
                what = "done" if code == 0 else f"exit code {code}, see {task.log}"
                say(
                    f"[{number}/{len(todo)}] {task.name}: {what} after "
                    f"{duration(time.monotonic() - began)}"
                )
                if code:
                    failed[task.name] = code
    return failed


def lines(jobs: Sequence[Job], ranks: int) -> list[str]:
    """A shell command for each run, which starts it, or goes on with it when its folder is there.

    ``exec``: the process that is started gets the signals of the one that reads the line.
    """
    return [f"exec {shlex.join([*launch.command(ranks), *_run(job)])}" for job in jobs]


def array(name: str, count: int, ranks: int, listed: Path, folder: Path) -> str:
    """The text of an sbatch script that runs line n of the file ``listed`` as task n of an array."""
    job = slurm.Job(name=name, log=f"{folder}/slurm-%A_%a.log", ranks=ranks, array=count)
    return slurm.script(job, slurm.task_of(shlex.quote(str(listed))))


def _run(job: Job) -> list[str]:
    return ["run", "--resume", str(job.beside(".yaml"))]


def _start(task: Task, more: Mapping[str, str]) -> subprocess.Popen:
    # not one of its tasks
    env = {name: value for name, value in os.environ.items() if name != "SLURM_NTASKS"} | more
    with open(nolinks.opened(task.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
        )


def _end(process: subprocess.Popen) -> None:
    """End a process that still runs; its last checkpoint is safe."""
    if process.poll() is None:
        process.terminate()
        process.wait()
