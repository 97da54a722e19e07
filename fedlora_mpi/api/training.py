"""``fedlora_mpi.run`` and ``fedlora_mpi.resume``: train from a script or a notebook."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import config as configs
from ..analysis.run_view import RunView, open_run
from ..core.paths import expand_home
from ..experiment.loop import STOPPED_EXIT
from ..mpi.comm import Solo, connect
from ..mpi.ending import CollectiveExit, Refusal, run_or_abort
from ..mpi.launch import is_launched
from ..mpi.local_ranks import INTERRUPTED_EXIT
from .task import NewRun, ResumedRun, Task, check_ranks, train_on_ranks

T = TypeVar("T")
_PREFIX = "fedlora-mpi: "  # of the lines that say how a command ended
# the last one: ranks that were asked to stop before they could hear it
_STOP_EXITS = (STOPPED_EXIT, INTERRUPTED_EXIT, 128 + signal.SIGUSR1)


def run(
    config: str | Path | Mapping[str, Any],
    *,
    ranks: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> RunView:
    """Train from a config into a new run folder, and return the run.

    It is ``fedlora-mpi run``: the same folder with the same numbers.

    config: a YAML file, the name of a config of the package (``"quickstart"``), YAML text of at
    least two lines, or a dict of the same keys. A dict and a text are called ``config`` in messages
    and in ``output: runs/{name}``.

    ranks: None trains in this process, or on the ranks of the ``mpirun`` that started the script. A
    number starts so many processes on this machine by mpirun, a server and ``ranks - 1`` workers;
    what they print goes to ``sys.stderr``. The user's own modules are then looked for in the
    working folder.

    resume: go on with the run folder if it is there; overwrite: replace it if it is there; quiet:
    print no line for each round.

    overrides: settings of the config, as keywords: ``rounds=3``, ``train={"lr": 0.1}`` or
    ``**{"train.lr": 0.1}``. A dict changes only the keys that it has.

    Raises ValueError for a mistake in what was asked, RuntimeError if the training fails, and
    KeyboardInterrupt if it was stopped: after the first Ctrl-C or SIGUSR1 at the end of a round,
    with a checkpoint. Global random states are not used; the number of torch's threads and the
    signal handlers are put back.

    >>> import fedlora_mpi
    >>> run = fedlora_mpi.run("quickstart", rounds=2, quiet=True, output="runs/short")
    >>> run.array("accuracy").shape
    (2,)
    """
    if resume and overwrite:
        raise ValueError("resume = True: overwrite = True would remove what it resumes; choose one")
    file_or_keys = _call_cleanly(lambda: configs.parse_tree(config))
    task = NewRun(file_or_keys, _override_texts(overrides), resume, overwrite, quiet)
    return _train(task, ranks)


def resume(
    path: str | Path, *, ranks: int | None = None, quiet: bool = False, **overrides: Any
) -> RunView:
    """Continue a run from its newest valid checkpoint, and return the run.

    It is ``fedlora-mpi resume``. path: the run folder; ranks, quiet, overrides and what it raises:
    as in ``run``. The number of ranks may differ from before. Only some keys may be overridden, for
    instance ``rounds``.

    >>> import fedlora_mpi
    >>> run = fedlora_mpi.run("quickstart", rounds=1, quiet=True, output="runs/longer")
    >>> run = fedlora_mpi.resume("runs/longer", rounds=3, quiet=True)
    >>> run.array("accuracy").shape
    (3,)
    """
    return _train(ResumedRun(expand_home(path), _override_texts(overrides), quiet), ranks)


def _override_texts(overrides: Mapping[str, Any]) -> list[str]:
    """``overrides`` as ``key=value`` texts. Raises ValueError."""
    return _call_cleanly(
        lambda: [configs.override_text(key, value) for key, value in overrides.items()]
    )


def _train(task: Task, ranks: int | None) -> RunView:
    """Train, and return the run. Raises ValueError, RuntimeError or KeyboardInterrupt."""
    lines: list[str] = []  # what the ranks say of how they end
    end = None
    with _keep_process_state():
        folder = expand_home(_call_cleanly(task.read).output)
        try:
            if ranks is None or is_launched():
                code = _train_here(task, ranks)
            else:
                code = train_on_ranks(task, ranks, lambda line: _show(line, lines))
        except CollectiveExit as error:
            end, code = "; ".join([str(error), *getattr(error, "__notes__", ())]), error.code
    end = end or (lines[-1] if lines else f"{folder}: exit code {code}; the ranks say why above")
    if code == 0:
        return open_run(folder)
    if code in _STOP_EXITS:
        raise KeyboardInterrupt(f"{folder}: stopped; continue with fedlora_mpi.resume")
    raise (ValueError if code == Refusal.code else RuntimeError)(_without_place(end))


def _call_cleanly(stage: Callable[[], T]) -> T:
    """``stage()``; its ValueError without the stack of what raised it."""
    try:
        return stage()
    except ValueError as error:
        message = _without_place(str(error))
    raise ValueError(message)


def _without_place(message: str) -> str:
    """A message without the name of a place that a user of Python does not have."""
    return message.removeprefix(f"{configs.COMMAND_LINE}: ").removeprefix("--")  # --ranks


def _train_here(task: Task, ranks: int | None) -> int:
    """Train in this process, one of those that a launcher has started or the only one.

    Returns the exit code. Raises CollectiveExit; with several ranks an error of this one alone ends
    all.
    """
    comm = connect() if is_launched() else Solo()
    ends: list[CollectiveExit] = []

    def train() -> int:
        try:
            check_ranks(ranks, comm)
            return task.train(comm)
        except CollectiveExit as end:
            ends.append(end)
            return end.code

    code = run_or_abort(comm, train) if comm.size > 1 else train()
    if ends:
        raise ends[0]
    return code


def _show(line: str, lines: list[str]) -> None:
    """Print a line of the ranks; keep it in ``lines`` if it may say how they ended."""
    if line.startswith(_PREFIX):
        lines.append(line.removeprefix(_PREFIX).rstrip("\n"))
    sys.stderr.write(line)
    sys.stderr.flush()


@contextmanager
def _keep_process_state() -> Iterator[None]:
    """Inside, a training may change this process; afterwards it is as before.

    As for a command, the working folder is at the end of the path of modules.
    """
    is_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGUSR1, signal.SIGINT) if is_main else ()
    handlers = {number: signal.getsignal(number) for number in signals}
    threads, has_gpu = torch.get_num_threads(), torch.cuda.is_available()
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    switches = switches if has_gpu else ()
    tf32 = [switch.allow_tf32 for switch in switches]
    deterministic = torch.backends.cudnn.deterministic
    folder = os.getcwd()
    is_new = folder not in sys.path
    if is_new:
        sys.path.append(folder)
    try:
        yield
    finally:
        if is_new and folder in sys.path:
            sys.path.remove(folder)
        for switch, allows in zip(switches, tf32, strict=True):
            switch.allow_tf32 = allows
        torch.backends.cudnn.deterministic = deterministic
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            if handler is not None:  # a handler that Python has not set
                signal.signal(number, handler)
