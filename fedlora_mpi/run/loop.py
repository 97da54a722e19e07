"""Start or resume a run: loop over rounds, log, checkpoint."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import config as configs
from ..components.lowrank import join_first, skipped_weights
from ..config import Config
from ..core.disk_errors import explain_write_errors
from ..core.escapes import escape_line
from ..core.paths import expand_home
from ..federation.federation import State
from ..federation.round import run_round
from ..mpi.comm import Comm
from ..mpi.ending import Fault, collectively
from ..mpi.pending import RankLost
from ..resilience.rebalancing import is_rebalancing_due, rebalance
from ..resilience.recovery import (
    recover,
    recovery_line,
    run_tolerant,
    surviving_comm,
    with_replicas,
)
from ..store import nolinks
from ..store.lock import locked
from ..store.log import Log
from ..store.run_folder import created
from ..store.sinks import Sink, opened
from ..store.snapshot import Checkpoint
from .assembly import Assembly, build, hosts
from .checkpointing import beginning, loaded, newest, save
from .output import (
    begun,
    continued,
    create_log,
    describe,
    fill,
    need_shared,
    recorded_config,
    same_as_begun,
)
from .progress import Progress

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may queue the job again


def start(config: Config, source: str, comm: Comm) -> int:
    """Train from round 1 into a new run folder; returns the exit code."""
    folder, asked = expand_home(config.output), _stop_signals()

    def begin(comm):
        return _begin(folder, config, source, comm, asked)

    def again(comm):
        return _begin_or_go_on(folder, config, source, comm, asked)

    return run_tolerant(config.faults, source, folder, comm, begin, again)


def _begin_or_go_on(
    folder: Path, config: Config, source: str, comm: Comm, asked: Sequence[int]
) -> int:
    """Play all rounds that there is no checkpoint of, whether the folder is there or not."""
    if not begun(folder, comm):
        return _begin(folder, config, source, comm, asked)
    recorded = _told(comm, lambda: continued(config, source, folder))
    return _go_on(folder, recorded, comm, asked)


def _begin(folder: Path, config: Config, source: str, comm: Comm, asked: Sequence[int]) -> int:
    """Play all rounds into a new run folder; returns the exit code."""

    def refuse_existing() -> None:
        if comm.rank == 0 and os.path.lexists(folder):
            raise ValueError(
                f"{source}: output = {folder}: the folder exists; continue it with "
                f"'fedlora-mpi resume {folder}' or choose another with output=..."
            )

    collectively(comm, refuse_existing)
    built = build(config, source, comm)
    need_shared(folder, comm)
    with _alone(comm, lambda: created(folder, lambda draft: fill(draft, built))):
        return _loop(*_protected(built, beginning(built)), folder, asked)


def start_or_resume(config: Config, source: str, comm: Comm) -> int:
    """Train until done whatever happened before; for a scheduler, which calls it again and again.

    Goes on with the run folder where there is one; settings that a resume may not change are
    refused.
    """
    folder, asked = expand_home(config.output), _stop_signals()

    def either(comm):
        return _begin_or_go_on(folder, config, source, comm, asked)

    return run_tolerant(config.faults, source, folder, comm, either, either)


def resume(folder: Path, overrides: Sequence[str], comm: Comm) -> int:
    """Continue a run from its newest valid checkpoint, on any number of ranks; returns the exit
    code.

    A run that was killed before its first checkpoint begins again.
    """
    config, comm = receive(comm, lambda: recorded_config(folder, overrides))
    asked = _stop_signals()

    def go_on(comm):
        return _go_on(folder, config, comm, asked)

    return run_tolerant(config.faults, str(folder / "config.yaml"), folder, comm, go_on, go_on)


def _go_on(folder: Path, config: Config, comm: Comm, asked: Sequence[int]) -> int:
    """Play the rounds of ``config`` that the folder does not have; returns the exit code."""
    built = build(config, str(folder / "config.yaml"), comm)
    need_shared(folder, comm)
    collectively(comm, lambda: same_as_begun(folder, built) if comm.rank == 0 else None)
    with _alone(comm, lambda: locked(folder)):
        found = newest(folder, built)
        collectively(comm, lambda: _put_back(folder, found, built) if comm.rank == 0 else None)
        state = collectively(comm, lambda: loaded(found, built)) if found else beginning(built)
        return _loop(*_protected(built, state), folder, asked)


def _put_back(folder: Path, found: Checkpoint | None, built: Assembly) -> None:
    """The folder's own files as they were at the checkpoint, or before round 1."""
    with explain_write_errors(folder):
        describe(folder, built)
        if found:
            found.restore_log(folder / "log.h5")
        else:
            nolinks.remove(folder / "log.h5")
            create_log(folder, built)


def receive(comm: Comm, read: Callable[[], Config]) -> tuple[Config, Comm]:
    """The config that ``read()`` gives on rank 0, on every rank that is alive, and these ranks."""
    while True:
        try:
            config = _told(comm, read)
            break
        except RankLost as lost:
            comm = surviving_comm(lost, comm)
    if comm.dead_ranks and not config.faults.tolerate:
        raise Fault(
            f"rank {', '.join(map(str, comm.dead_ranks))} died before the run began; start again"
        )
    return config, comm


def _told(comm: Comm, read: Callable[[], Config]) -> Config:
    """The config that ``read()`` gives on rank 0, on every rank. Raises Lost."""
    config = collectively(comm, lambda: read() if comm.rank == 0 else None)
    text = json.dumps(configs.resolved_dict(config)) if comm.rank == 0 else ""
    return configs.from_dict(json.loads(comm.broadcast(text.encode())), "config of rank 0")


@contextmanager
def _alone(comm: Comm, hold: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Rank 0 holds the folder's lock; raises Refused on all ranks when another run has it."""
    with ExitStack() as stack:
        collectively(comm, lambda: stack.enter_context(hold()) if comm.rank == 0 else None)
        yield


def _protected(built: Assembly, state: State) -> tuple[Assembly, State]:
    """Both, with copies in memory that outlive a worker where the config asks for it."""
    return (
        replace(built, run=with_replicas(built.run, state))
        if built.config.faults.tolerate
        else built
    ), state


def _loop(built: Assembly, state: State, folder: Path, asked: Sequence[int]) -> int:
    """Play the rounds that are left, or until somebody ``asked`` to stop; returns the exit code."""
    config, comm = built.config, built.run.comm
    with ExitStack() as stack:
        log, too = collectively(
            comm, lambda: _opened(config, folder, stack) if comm.rank == 0 else (None, [])
        )
        if log:
            for hint in hints(built):
                print(f"hint: {hint}", file=sys.stderr)
            if comm.dead_ranks:
                _tell_of_death(
                    log,
                    f"{recovery_line(comm.dead_ranks, comm, state.round)}, from what was on disk",
                )
        state = _rounds(built, state, folder, asked, log, too)
    done = state.round >= config.rounds
    if log:
        print(
            f"{escape_line(folder)}: "
            + (
                "done"
                if done
                else f"stopped after round {state.round}; continue with "
                f"'fedlora-mpi resume {escape_line(folder)}'"
            ),
            flush=True,
        )
    return 0 if done else STOPPED


def _opened(config: Config, folder: Path, stack: ExitStack) -> tuple[Log, list[Sink]]:
    """The log and what is written beside it, until the ``stack`` ends. Raises ValueError,
    Unwritable.
    """
    too = opened(folder, csv=config.log.csv, tensorboard=config.log.tensorboard)
    for sink in too:
        stack.enter_context(closing(sink))
    log = stack.enter_context(Log.append_to(folder / "log.h5"))
    log.describe(configs.sealed_yaml(config), json.dumps(configs.resolved_dict(config)))
    return log, too


def _rounds(
    built: Assembly,
    state: State,
    folder: Path,
    asked: Sequence[int],
    log: Log | None,
    too: Sequence[Sink],
) -> State:
    """The state after the last round, or after the one in which somebody ``asked`` to stop;
    ``too``: written beside the log.
    """
    config, progress = built.config, Progress(built.config.rounds, state.round)
    stop, saved, logged = False, state.round, state.round
    while True:
        try:
            done = stop or state.round >= config.rounds
            if saved < state.round and (done or state.round % config.checkpoint.every == 0):
                save(built, folder, state)
                saved = state.round
            if done:
                if built.run.journal:
                    built.run.journal.close()
                return state
            evaluate = (
                state.round + 1 == config.rounds or (state.round + 1) % config.evaluate.every == 0
            )
            state, row, clients = run_round(built.run, state, evaluate, stop=bool(asked))
            row |= (
                {"epsilon": built.run.epsilon(state.round)}
                if log and config.privacy.is_differential
                else {}
            )
            stop, logged = (
                row.pop("stop"),
                _tell(log, too, progress, state.round, row, clients, logged),
            )
            if built.run.journal:
                built.run.journal.begin_round(state)
            if is_rebalancing_due(built.run, state.round):
                workers = hosts(config, built.run.comm.size)
                run, state = rebalance(built.run, state, workers, config.mix)
                built = replace(built, run=run)
        except RankLost as lost:
            if not built.run.journal:
                raise

            def alone(comm):
                return build(config, str(folder / "config.yaml"), comm).run

            def workers(size):
                return hosts(config, size)

            run, state, saved, line = recover(lost, built.run, saved, workers, config.mix, alone)
            built, stop = replace(built, run=run), False
            if log:
                _tell_of_death(log, line)


def _tell_of_death(log: Log, line: str) -> None:
    print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)
    log.lost(line)


def _tell(
    log: Log | None, too: Sequence[Sink], progress: Progress, round_: int, row: dict, clients: Mapping[str, np.ndarray],
    logged: int,
) -> int:  # fmt: skip
    """Log a round unless it was ``logged`` before a death made it be played again; returns the
    newest round logged.
    """
    if round_ <= logged:
        return logged
    if log:
        if skipped := row.get("skipped"):
            ids, rest = (
                ", ".join(map(str, skipped)),
                "" if row["clients"] else "; nobody is left, the shared state stays",
            )
            print(
                f"fedlora-mpi: round {round_}: skipped client {ids}: loss or upload is not "
                f"finite{rest}",
                file=sys.stderr,
            )
        if "skipped" in row:
            row["skipped"] = len(skipped)
        if ids := row.pop("nan_clients"):
            few, rest = (
                ", ".join(map(str, ids[:10])),
                f" and {len(ids) - 10} more" if len(ids) > 10 else "",
            )
            print(
                f"fedlora-mpi: round {round_}: client {few}{rest}: logits of test samples are no "
                "numbers (nan); these samples count as wrong, see nan_predictions of the log",
                file=sys.stderr,
            )
        ranks = row.pop("seconds_ranks")
        for sink in (log, *too):
            sink.append(round_, row, clients, ranks)
        progress.tell(round_, row)
    return round_


def hints(built: Assembly) -> list[str]:
    """What would make this run faster on this node, for the user to decide, and what its low-rank
    parts leave out.
    """
    comm, engine, found = built.run.comm, built.config.engine, []
    workers = len(set(built.run.rank_of_group))
    if workers < (possible := len(hosts(built.config, comm.size))):
        found.append(
            f"{len(built.run.groups)} groups of clients keep {workers} of {possible} workers busy; "
            "a smaller engine.group_size gives work to more (and changes rounding)"
        )
    here = comm.local_size - (possible < comm.size)
    cores, busy = os.cpu_count() or 1, here * engine.threads
    if engine.device == "cpu" and busy > cores:
        found.append(
            f"{here} workers with {engine.threads} thread(s) share {cores} cores; start fewer ranks"
        )
    elif engine.device == "cpu" and busy <= cores // 2 and possible < len(built.run.groups):
        found.append(
            f"{busy} of {cores} cores are busy; mpirun -n {cores // engine.threads + 1} would use "
            "them all"
        )
    return found + _undecomposed(built)


def _undecomposed(built: Assembly) -> list[str]:
    """Which weights have no low-rank part, where the config asks for one in all."""
    algorithm, found = built.run.algorithm, []
    full = getattr(algorithm, "full", ())
    if "*" not in getattr(algorithm, "layers", ()):
        return found
    for network in sorted({kind.network for kind in built.run.kinds}):
        model = next(kind.trainer.model for kind in built.run.kinds if kind.network == network)
        low_rank = algorithm.low_rank(model)
        rest = skipped_weights(model, low_rank, full)
        rest = [f"{name} ({why})" for name, why in rest.items() if model.role(name) not in full]
        if low_rank and rest:
            found.append(
                f"{configs.algorithm_name(algorithm)} decomposes {len(low_rank)} of "
                f"{len(low_rank) + len(rest)} weights; not decomposed: {join_first(rest)}; "
                "'fedlora-mpi plan' lists them"
            )
    return found


def _stop_signals() -> list[int]:
    """A list that SIGUSR1 fills: the run then stops at the next round boundary, with a checkpoint.
    In another thread than the first, which gets no signals, it stays empty.
    """
    asked: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    return asked
