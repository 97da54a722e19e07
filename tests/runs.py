"""Small runs for the tests: in this process, over simulated ranks, or under mpirun (needs Linux's
/proc).
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch

from fedlora_mpi import config as configs
from fedlora_mpi.experiment.assembly import Assembly, build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.loop import _start_new_run
from fedlora_mpi.federation.federation import Federation, State
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.heartbeat import Heartbeat
from fedlora_mpi.store.reader import RunFiles

T = TypeVar("T")
TESTS = Path(__file__).parent
TINY = TESTS / "tiny.yaml"
NORM = "model=user_parts:with_norm"
SLOW = "model=user_parts:slow"
MIXED = (  # clients with networks of three kinds
    "algorithm=pfedlora",
    "model={mix: [user_parts:wide, {name: cnn, width: 4, hidden: 8}, user_parts:normed]}",
    "engine.group_size=1",
)


# --- in this process, without a run folder


class RoundSnapshot(NamedTuple):
    """What there is after a round: the variables, and what was measured in it."""

    shared: dict[str, torch.Tensor]
    personal: dict[str, torch.Tensor]  # [N, ...]
    row: dict
    clients: dict[str, np.ndarray]  # [N]
    server: dict[str, torch.Tensor] = {}


class ThreadRank:
    """One of several ranks in this process, each a thread; only the holder of the baton runs.

    So nothing is concurrent, and code that touches a process-wide state (torch's generator while a
    model is built) is as safe as in processes.
    """

    is_tolerant, dead_ranks = False, ()

    def __init__(self, rank: int, meeting: tuple[list, threading.Lock, threading.Barrier]) -> None:
        self.rank = self.local_rank = rank
        self._slots, self._baton, self._barrier = meeting
        self.heartbeat = Heartbeat()
        self.size = self.local_size = len(self._slots)

    def sum(self, buffer: np.ndarray) -> None:
        buffer[...] = np.sum(self._allgather(buffer.copy()), axis=0)

    def broadcast(self, data: bytes) -> bytes:
        return self._allgather(data)[0]

    def gather(self, send: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        parts = self._allgather(send)
        assert [len(part) for part in parts] == list(counts)
        return np.concatenate(parts)

    def exchange(
        self, send: np.ndarray, counts: Sequence[int], receive_counts: Sequence[int]
    ) -> np.ndarray:
        parts = [
            np.split(buffer, np.cumsum(split_sizes)[:-1])[self.rank]
            for buffer, split_sizes in self._allgather((send, list(counts)))
        ]
        assert [len(part) for part in parts] == list(receive_counts)
        return np.concatenate(parts)

    def _allgather(self, value) -> list:
        """What every rank gave, in rank order."""
        self._slots[self.rank] = value
        self._wait_for_all()
        values = list(self._slots)
        self._wait_for_all()  # before anybody fills the slots again
        return values

    def _wait_for_all(self) -> None:
        with self.heartbeat.waiting():
            self._baton.release()
            try:
                self._barrier.wait(60)
            finally:
                self._baton.acquire()

    def run_with_baton(self, main: "Callable[[ThreadRank], T]") -> T:
        """``main(self)`` with the baton; its exception frees those who wait for this rank."""
        with self._baton:
            try:
                return main(self)
            except BaseException:
                self._barrier.abort()
                raise


def run_on_ranks(number: int, main: Callable[[Any], T]) -> list[T]:
    """``main(comm)`` of every rank, in rank order; the first exception is raised."""
    if number == 1:
        return [main(Solo())]
    meeting = ([None] * number, threading.Lock(), threading.Barrier(number))
    with ThreadPoolExecutor(number) as pool:
        futures = [
            pool.submit(ThreadRank(rank, meeting).run_with_baton, main) for rank in range(number)
        ]
    errors = [future.exception() for future in futures if future.exception()]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [end.result() for end in futures]


@cache
def tiny_config(*overrides: str) -> configs.Config:
    """The config of tiny.yaml with overrides."""
    return configs.read(TINY, overrides)


@cache
def build_tiny(*overrides: str) -> Assembly:
    """The parts of that run in one process."""
    return build(tiny_config(*overrides), str(TINY), Solo())


def create_run(ranks: int, folder: Path, *overrides: str) -> Path:
    """The new run folder of tiny.yaml with overrides, as ``mpirun`` would make it, by simulated
    ranks.

    Not by ``start``, which takes the signals of the process: threads may not.
    """
    config = configs.read(TINY, [*overrides, f"output={folder}"])
    assert (
        run_on_ranks(ranks, lambda comm: _start_new_run(folder, config, str(TINY), comm, []))
        == [0] * ranks
    )
    return folder


def snapshot(state: State, row: dict, clients: dict[str, np.ndarray]) -> RoundSnapshot:
    """A copy of what there is after a round; its personal rows are those of this rank."""
    trees = (clone_tree(tree) for tree in (state.shared, state.personal))
    return RoundSnapshot(*trees, row, clients, clone_tree(state.server))


@cache
def run_rounds(*overrides: str, ranks: int = 1) -> list[list[RoundSnapshot]]:
    """The moments of each rank, [ranks][rounds + 1]; the first is the one before round 1.

    Personal rows are those of all clients (of a kind), whichever rank hosts them. Cached: change
    nothing in it.
    """
    config = tiny_config(*overrides)

    def main(comm) -> tuple[Federation, list[RoundSnapshot]]:
        parts = build(config, str(TINY), comm)
        state = initial_state(parts)
        moments = [snapshot(state, {}, {})]
        for _ in range(config.rounds):
            state, row, clients = run_round(parts.federation, state, evaluate=True, stop=False)
            moments.append(snapshot(state, row, clients))
        return parts.federation, moments

    results = run_on_ranks(ranks, main)
    federations = [federation for federation, _ in results]
    hosted = [client for f in federations for client in f.placement.local_clients]
    assert sorted(hosted) == list(range(config.data.partition.clients)), f"hosted: {hosted}"
    personal_at = [
        join_personal(federations, [moments[index].personal for _, moments in results])
        for index in range(config.rounds + 1)
    ]
    return [
        [m._replace(personal=personal_at[at]) for at, m in enumerate(moments)]
        for _, moments in results
    ]


def join_personal(runs: Sequence[Federation], personal: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The personal leaves of all ranks together: of each kind [n, ...], its clients in the order of
    their ids.
    """
    personal_leaves = {}
    for number, kind in enumerate(runs[0].clients.types):
        order = torch.tensor(
            [client for run in runs for client in run.placement.local_clients_by_type[number]]
        ).argsort()
        names = [kind.prefix + name for name in kind.initial.personal]
        personal_leaves |= {n: torch.cat([tree[n] for tree in personal])[order] for n in names}
    return personal_leaves


def snapshots_equal(a: RoundSnapshot, b: RoundSnapshot) -> bool:
    """Whether two moments agree to the bit in variables and clients' results, and in all rounds'
    numbers but times and MPI's bytes.
    """

    def reproducible(row):
        return {n: v for n, v in row.items() if not n.startswith(("seconds_", "bytes_mpi"))}

    def arrays_equal(x, y):
        return x.keys() == y.keys() and all(np.array_equal(x[n], y[n], equal_nan=True) for n in x)

    return (
        trees_equal(a.shared, b.shared)
        and trees_equal(a.personal, b.personal)
        and trees_equal(a.server, b.server)
        and arrays_equal(reproducible(a.row), reproducible(b.row))
        and arrays_equal(a.clients, b.clients)
    )


def clone_tree(tree: dict) -> dict:
    return {n: v.clone() for n, v in tree.items()}


def trees_equal(a: dict, b: dict) -> bool:
    """Whether two trees agree in names, shapes and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_near(a: dict, b: dict, atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- run folders


def run_outcome(run: Path) -> dict:
    """What must not depend on where and how a run was computed: all but times and MPI's bytes."""
    files = RunFiles(run)
    checkpoint = files.checkpoint()
    rounds = {
        n: v.tolist()
        for n, v in files.rounds().items()
        if n != "bytes_mpi" and not n.startswith("seconds_")
    }
    clients = {n: v.tolist() for n, v in files.clients().items()}
    return {"round": checkpoint.round, **checkpoint.digest(), "rounds": rounds, "clients": clients}


def assert_same_run(a: Path, b: Path) -> None:
    """Raise unless the two run folders end in the same bits."""
    np.testing.assert_equal(run_outcome(a), run_outcome(b))  # NaN equals NaN


def last_checkpoint(run: Path) -> int:
    """The newest round with a committed checkpoint, 0 before the first."""
    return max((int(f.parent.name) for f in run.glob("checkpoints/*/manifest.json")), default=0)


# --- other processes


def process_environment(**extra: str) -> dict[str, str]:
    """The environment of a process that runs the package and the user's parts; as root or not."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    allow_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **allow_root, "PYTHONPATH": path, "HWLOC_HIDE_ERRORS": "1", **extra}


def command_line(*arguments: str | Path) -> list[str]:
    """The package's command line in a process of its own."""
    return [sys.executable, "-m", "fedlora_mpi", *map(str, arguments)]


def mpirun_command(ranks: int) -> list[str]:
    """The launcher beside this Python. Skips the test where there is none."""
    launcher = Path(sys.executable).with_name("mpirun")
    if not launcher.exists():
        pytest.skip(f"no {launcher}: pip install 'fedlora-mpi[mpi]' has it")
    return [str(launcher), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]


@contextmanager
def launch(line: Sequence[str], cwd: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A process that goes on while the block runs,
    and is gone after it with all ranks it started."""
    process = subprocess.Popen(
        line,
        cwd=cwd,
        env=process_environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a launcher that cleans up kills process groups, and pytest has one too
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_all(process)


def kill_all(launcher: subprocess.Popen) -> None:
    """SIGKILL to every rank, then wait for the launcher."""
    for pid in rank_pids(launcher.pid).values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        launcher.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.communicate()


def run_process(
    line: Sequence[str], cwd: Path, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """The ended process, its output as text."""
    with launch(line, cwd, **env) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def package_lines(text: str) -> list[str]:
    """The lines that the package itself addressed to the user, without those of a launcher."""
    return [line for line in text.splitlines() if line.startswith("fedlora-mpi:")]


def json_places(tree, above=()):
    """The way to every value inside nested dictionaries and lists."""
    items = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield (*above, key)
        yield from json_places(value, (*above, key))


def wait_until(
    condition: Callable[[], object], seconds: float = 120, process: subprocess.Popen | None = None
):
    """``fact()`` as soon as it is true; fails when ``process`` ends first or time runs out."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        has_ended = process is not None and process.poll() is not None
        if has_ended or time.monotonic() > deadline:
            text = process.communicate()[1] if has_ended else ""
            pytest.fail(
                f"{'the process ended' if has_ended else f'{seconds} s were over'} too early\n{text}"
            )
        time.sleep(0.02)
    return value


def rank_pids(launcher: int) -> dict[int, int]:
    """{rank: pid} of the processes that a launcher has started."""
    parents, pid_of = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:  # it has ended since
                continue
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != launcher:
            ancestor = parents[ancestor]
        if ancestor == launcher:
            with suppress(OSError):  # it has ended since
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                if rank := re.search(rb"\0(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)", environment):
                    pid_of[int(rank[1])] = pid
    return pid_of


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
