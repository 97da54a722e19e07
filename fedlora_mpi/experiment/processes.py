"""Child processes of this program, each with a file for its output: runs of a table or a sweep."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..core.escapes import escape_line
from ..store import nolinks
from ..store.files import open_for_reading


class Task(NamedTuple):
    """A process to start. Its output is appended to ``log``."""

    name: str
    command: Sequence[str]
    log: Path


class EndedTask(NamedTuple):
    """A task whose process has ended, with its exit code and the seconds that it took."""

    task: Task
    code: int
    seconds: float


class Slots(NamedTuple):
    """How many runs this machine trains at once, and the GPUs that they take in turn."""

    number: int
    gpus: Sequence[str] = ()  # values of CUDA_VISIBLE_DEVICES


def plan_slots(jobs: int | None, ranks: int, threads: int = 1) -> Slots:
    """Return ``jobs`` slots; without a number, one for each GPU, or as many as the cores allow.

    ranks: processes of a run; threads: of each process.
    """
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if count and ranks == 1:
        return Slots(jobs or count, visible)
    cores = len(os.sched_getaffinity(0)) // threads
    return Slots(jobs or max(1, (count or cores) // ranks))


class Pool:
    """The processes of at most ``slots.number`` tasks at once.

    own_groups: the terminal sends Ctrl-C to this process alone. When the block ends, processes that
    still run are terminated; their last checkpoints are safe.
    """

    def __init__(self, slots: Slots, own_groups: bool = False) -> None:
        self._slots, self._own_groups = slots, own_groups
        self._running: dict[int, tuple[Task, subprocess.Popen, float]] = {}  # by slot

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.send_signal(signal.SIGTERM)
        for _, process, _ in self._running.values():
            process.wait()

    @property
    def tasks(self) -> list[Task]:
        """The tasks that run."""
        return [task for task, _, _ in self._running.values()]

    @property
    def has_room(self) -> bool:
        """Whether another task can start."""
        return len(self._running) < self._slots.number

    def start(self, task: Task) -> None:
        """Start a task in a free slot."""
        slot = next(slot for slot in range(self._slots.number) if slot not in self._running)
        gpus = self._slots.gpus
        extra_env = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        process = start_process(task, extra_env, self._own_groups)
        self._running[slot] = task, process, time.monotonic()

    def collect_ended(self) -> list[EndedTask]:
        """Return the tasks that have ended since the last call."""
        ended: list[EndedTask] = []
        for slot, (task, process, start_time) in list(self._running.items()):
            if (code := process.poll()) is not None:
                del self._running[slot]
                ended.append(EndedTask(task, code, time.monotonic() - start_time))
        return ended

    def send_signal(self, number: int, task: Task | None = None) -> None:
        """Send a signal to the process of ``task``, or to all."""
        for running_task, process, _ in self._running.values():
            if task in (None, running_task):
                with suppress(ProcessLookupError):
                    process.send_signal(number)


def start_process(
    task: Task, extra_env: Mapping[str, str], own_group: bool = False
) -> subprocess.Popen:
    """Start the process of a task."""
    # without SLURM_NTASKS, or the new process would take itself for a task of this Slurm job
    env = {name: value for name, value in os.environ.items() if name != "SLURM_NTASKS"}
    env |= extra_env
    with open(nolinks.open_handle(task.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
        return subprocess.Popen(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            process_group=0 if own_group else None,
        )


def last_line(log: Path) -> str:
    """Return the last line of a task's output that is not blank."""
    with open_for_reading(log) as file:
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return escape_line(next(filter(None, reversed(lines)), "no output"))
