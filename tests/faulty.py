"""Commands of the package in forked processes, killed or starved of disk at a chosen moment:
``Machine``.

``python faulty.py`` is the machine itself: it imports everything once, then forks a child per line
of its input, so that a small run costs half a second. With ``faults.c`` preloaded a child can be
made to end at its n-th write.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BEFORE, WITHIN, AFTER, FAIL = range(4)


class ProcessResult(NamedTuple):
    """code: as subprocess gives it, negative for a signal, None where the time was over; trace: the
    calls it met.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    trace: list[str]


class ForkServer:
    """Runs commands in processes that have imported everything."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def __call__(
        self, *arguments: str | Path, ranks: int = 1, cwd: Path, **options
    ) -> ProcessResult:
        """``fedlora-mpi ARGUMENTS`` in ``cwd``; ranks: simulated ones, each a thread, which die
        together.

        under: the name of the folder that is watched; call, phase, error: see ``faults.c``; kill:
        SIGKILL after so many seconds; limit: seconds until it counts as hanging; user: a number to
        become before.
        """
        request = {"arguments": [*map(str, arguments)], "ranks": ranks, "cwd": str(cwd), **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return ProcessResult(*json.loads(self._process.stdout.readline()))


@contextmanager
def start_fork_server(**env: str) -> Iterator[ForkServer]:
    """A machine, its preloaded library compiled where there is a compiler; the caller skips where
    there is none.
    """
    with tempfile.TemporaryDirectory() as home:
        library = Path(home, "faults.so")
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "LD_PRELOAD": str(library)},
        )
        try:
            yield ForkServer(process)
        finally:
            process.stdin.close()
            process.wait()


def _serve_requests() -> None:
    """Answer each line of the input; the answers go where the output was."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    for line in sys.stdin:
        print(json.dumps(_run_forked(json.loads(line))), file=answers, flush=True)


def _warm_up() -> None:
    """Import, and run once, whatever the first command would."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        folder = f"{home}/run"
        config = str(Path(__file__).with_name("faulty.yaml"))
        for line in (["run", config, f"output={folder}"], ["report", folder], ["digest", folder]):
            _run_command(line)
        from fedlora_mpi.analysis.run_view import open_run

        open_run(folder).client(0).model  # noqa: B018


def _run_forked(request: dict) -> ProcessResult:
    """A child that does what is asked."""
    with tempfile.TemporaryDirectory() as home:
        out, err, trace = (Path(home, name) for name in ("out", "err", "trace"))
        started = time.monotonic()
        if (pid := os.fork()) == 0:
            _run_child(request, out, err, trace)
        deadline, kill = started + request.get("limit", 60), request.get("kill")
        exit_code = None
        while exit_code is None:
            ended_pid, status = os.waitpid(pid, os.WNOHANG)
            current_time = time.monotonic()
            if ended_pid:
                exit_code = os.waitstatus_to_exitcode(status)
            elif current_time > deadline or (kill is not None and current_time > started + kill):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                exit_code = -signal.SIGKILL if current_time <= deadline else None
                break
            else:
                time.sleep(0.001)
        texts = [
            path.read_text(errors="replace") if path.exists() else "" for path in (out, err, trace)
        ]
        return ProcessResult(
            exit_code, *texts[:2], time.monotonic() - started, texts[2].splitlines()
        )


def _run_child(request: dict, out: Path, err: Path, trace: Path) -> None:
    """Never returns."""
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(request["cwd"])
        if request.get("under"):
            library = ctypes.CDLL(os.environ["LD_PRELOAD"])
            library.faults_trace(os.open(trace, os.O_WRONLY | os.O_CREAT))
            fault = request.get("call", -1), request.get("phase", 0), request.get("error", 0)
            library.faults_arm(request["under"].encode(), ctypes.c_long(fault[0]), *fault[1:])
        if request.get("user"):
            os.setgid(request["user"])
            os.setuid(request["user"])
        code = _run_command(request["arguments"], request["ranks"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # HDF5 closes nothing behind our back; the command has
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(99)


def _run_command(arguments: Sequence[str], ranks: int = 1) -> int:
    """The exit code of a command of the package, or of ``open_run`` used on a run folder."""
    from fedlora_mpi.cli import main

    if arguments[0] == "open_run":
        return _read_run(Path(arguments[1]))
    if ranks == 1:
        return main(arguments)
    from runs import run_on_ranks

    from fedlora_mpi import config
    from fedlora_mpi.experiment import loop as run
    from fedlora_mpi.mpi.ending import run_or_abort

    run.collect_stop_signals = list  # only the main thread may ask for signals
    source, *overrides = (text for text in arguments[1:] if text != "--resume")
    parsed = config.read(source, overrides)
    return max(
        run_on_ranks(
            ranks,
            lambda comm: run_or_abort(comm, lambda: run.start_or_resume(parsed, source, comm)),
        )
    )


def _read_run(folder: Path) -> int:
    """Whatever ``open_run`` offers, said as text; a mistake is one line and code 2, as a command
    has it.
    """
    import numpy as np

    from fedlora_mpi.analysis.run_view import open_run

    try:
        run = open_run(folder)
        contents = [
            run.config,
            run.rounds.to_dict(),
            run.clients.to_dict(),
            run.partition,
            run.digest(),
            run.checkpoints,
        ]
        client = run.client(1)
        contents += [
            client.counts,
            {name: value.tobytes() for name, value in client.weights.items()},
            client.model,
        ]
        if "text" in run.config["data"] and (folder / "vocabulary.json").exists():
            contents.append(run.vocabulary.json)
    except ValueError as error:
        print(f"fedlora-mpi: {error}", file=sys.stderr)
        return 2
    with np.printoptions(threshold=10**9):
        print(contents)
    return 0


if __name__ == "__main__":
    _serve_requests()
