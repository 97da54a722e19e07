"""Carry out the runs of a grid: here, several at a time, or as the lines of a Slurm array."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..units import duration
from .grid import Job

STOPPED = 75  # the run's exit code at a round boundary, with a checkpoint


class Task(NamedTuple):
    """A process to start, its output to be added to ``log``."""

    name: str
    command: Sequence[str]
    log: Path


def tasks(jobs: Sequence[Job], ranks: int) -> list[Task]:
    """Start or go on with each run, by what is in its folder."""
    start = launcher(ranks)
    return [Task(job.name, [*start, *(_resume(job) if _begun(job) else _run(job))], job.beside(".log")) for job in jobs]


def work(
    todo: Sequence[Task], at_once: int, say: Callable[[str], None], gpus: Sequence[str] = ()
) -> dict[str, int]:
    """Run all tasks, ``at_once`` of them at a time; returns the exit codes of those that did not end well.

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
                    process = _start(task, {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})
                    ends.callback(_end, process)
                    running[place] = number, task, process, time.monotonic()
            time.sleep(0.05)
            for place, (number, task, process, began) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[place]
                what = "done" if code == 0 else f"exit code {code}, see {task.log}"
                say(f"[{number}/{len(todo)}] {task.name}: {what} after {duration(time.monotonic() - began)}")
                if code:
                    failed[task.name] = code
    return failed


def launcher(ranks: int) -> list[str]:
    """The command up to the subcommand. Raises ValueError where there is no mpirun for several ranks."""
    python = [sys.executable, "-m", "fedlora_mpi"]
    if ranks == 1:
        return python
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.is_file() else shutil.which("mpirun")
    if mpirun is None:
        raise ValueError(f"--ranks = {ranks}: no mpirun beside {sys.executable} or on PATH; use --ranks 1")
    return [mpirun, "-n", str(ranks), "--bind-to", "none", *python]


def lines(jobs: Sequence[Job], ranks: int) -> list[str]:
    """A shell command for each run, which starts it, or goes on with it when its folder is there.

    ``exec``: the process that is started gets the signals of the one that reads the line.
    """
    start = shlex.join(launcher(ranks))
    return [
        f"if [ -f {shlex.quote(str(job.folder / 'config.yaml'))} ]; "
        f"then exec {start} {shlex.join(_resume(job))}; else exec {start} {shlex.join(_run(job))}; fi"
        for job in jobs
    ]


def array(name: str, count: int, ranks: int, listed: Path, folder: Path) -> str:
    """The text of an sbatch script that runs line n of the file ``listed`` as task n of an array.

    Two minutes before its time is up a run stops at the end of a round and is queued again.
    """
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=1-{count}
#SBATCH --nodes=1
#SBATCH --ntasks={ranks}
#SBATCH --cpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --output={folder}/slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
##SBATCH --gpus=1
line=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(listed))})
bash -c "$line" &
run=$!
trap 'kill -USR1 $run' USR1
while wait $run; code=$?; kill -0 $run 2>/dev/null; do :; done
if [ $code -eq {STOPPED} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi
exit $code
"""


def _begun(job: Job) -> bool:
    return (job.folder / "config.yaml").is_file()


def _run(job: Job) -> list[str]:
    return ["run", str(job.beside(".yaml"))]


def _resume(job: Job) -> list[str]:
    return ["resume", str(job.folder), f"rounds={job.config.rounds}", f"data.root={job.config.data.source.root}"]


def _start(task: Task, more: Mapping[str, str]) -> subprocess.Popen:
    with open(task.log, "ab") as log:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | more
        )


def _end(process: subprocess.Popen) -> None:
    """End a process that still runs; its last checkpoint is safe."""
    if process.poll() is None:
        process.terminate()
        process.wait()
