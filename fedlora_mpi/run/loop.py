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
from ..store.lock import hold_lock
from ..store.log import Log
from ..store.run_folder import create_run_folder
from ..store.sinks import Sink, open_sinks
from ..store.snapshot import Checkpoint
from .assembly import Assembly, build, worker_ranks
from .checkpointing import find_newest, initial_state, load_state, save_checkpoint
from .output import (
    adopt_recorded_engine,
    check_shared_folder,
    check_unchanged,
    create_log,
    fill_run_folder,
    recorded_config,
    run_exists,
    write_descriptions,
)
from .progress import Progress

STOPPED_EXIT = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may queue the job again


def start(config: Config, source: str, comm: Comm) -> int:
    """Train from round 1 into a new run folder; returns the exit code."""
    folder, stop_requests = expand_home(config.output), _collect_stop_signals()

    def start_anew(comm):
        return _start_new_run(folder, config, source, comm, stop_requests)

    def start_or_continue(comm):
        return _start_or_continue(folder, config, source, comm, stop_requests)

    return run_tolerant(config.faults, source, folder, comm, start_anew, start_or_continue)


def _start_or_continue(
    folder: Path, config: Config, source: str, comm: Comm, stop_requests: Sequence[int]
) -> int:
    """Train the rounds after the newest checkpoint, or all into a new folder."""
    if not run_exists(folder, comm):
        return _start_new_run(folder, config, source, comm, stop_requests)
    recorded = _broadcast_config(comm, lambda: adopt_recorded_engine(config, source, folder))
    return _continue_run(folder, recorded, comm, stop_requests)


def _start_new_run(
    folder: Path, config: Config, source: str, comm: Comm, stop_requests: Sequence[int]
) -> int:
    """Train all rounds into a new run folder; returns the exit code."""

    def refuse_existing() -> None:
        if comm.rank == 0 and os.path.lexists(folder):
            raise ValueError(
                f"{source}: output = {folder}: the folder exists; continue it with "
                f"'fedlora-mpi resume {folder}' or choose another with output=..."
            )

    collectively(comm, refuse_existing)
    assembly = build(config, source, comm)
    check_shared_folder(folder, comm)
    with _hold_on_rank_0(
        comm, lambda: create_run_folder(folder, lambda draft: fill_run_folder(draft, assembly))
    ):
        return _train(
            *_replicate_if_tolerant(assembly, initial_state(assembly)), folder, stop_requests
        )


def start_or_resume(config: Config, source: str, comm: Comm) -> int:
    """Start the run, or continue its folder if it exists; a scheduler calls this until it is done.

    Refuses to continue with settings that a resume may not change.
    """
    folder, stop_requests = expand_home(config.output), _collect_stop_signals()

    def start_or_continue(comm):
        return _start_or_continue(folder, config, source, comm, stop_requests)

    return run_tolerant(config.faults, source, folder, comm, start_or_continue, start_or_continue)


def resume(folder: Path, overrides: Sequence[str], comm: Comm) -> int:
    """Continue a run from its newest valid checkpoint; returns the exit code.

    The number of ranks may differ. A run without a checkpoint begins again.
    """
    config, comm = receive_config(comm, lambda: recorded_config(folder, overrides))
    stop_requests = _collect_stop_signals()

    def go_on(comm):
        return _continue_run(folder, config, comm, stop_requests)

    return run_tolerant(config.faults, str(folder / "config.yaml"), folder, comm, go_on, go_on)


def _continue_run(folder: Path, config: Config, comm: Comm, stop_requests: Sequence[int]) -> int:
    """Train the rounds of ``config`` that the folder does not have; returns the exit code."""
    assembly = build(config, str(folder / "config.yaml"), comm)
    check_shared_folder(folder, comm)
    collectively(comm, lambda: check_unchanged(folder, assembly) if comm.rank == 0 else None)
    with _hold_on_rank_0(comm, lambda: hold_lock(folder)):
        snapshot = find_newest(folder, assembly)
        collectively(
            comm, lambda: _restore_files(folder, snapshot, assembly) if comm.rank == 0 else None
        )
        state = (
            collectively(comm, lambda: load_state(snapshot, assembly))
            if snapshot
            else initial_state(assembly)
        )
        return _train(*_replicate_if_tolerant(assembly, state), folder, stop_requests)


def _restore_files(folder: Path, snapshot: Checkpoint | None, assembly: Assembly) -> None:
    """The folder's own files as they were at the checkpoint, or before round 1."""
    with explain_write_errors(folder):
        write_descriptions(folder, assembly)
        if snapshot:
            snapshot.restore_log(folder / "log.h5")
        else:
            nolinks.remove(folder / "log.h5")
            create_log(folder, assembly)


def receive_config(comm: Comm, read: Callable[[], Config]) -> tuple[Config, Comm]:
    """The config that ``read()`` gives on rank 0, on every rank that is alive, and these ranks."""
    while True:
        try:
            config = _broadcast_config(comm, read)
            break
        except RankLost as lost:
            comm = surviving_comm(lost, comm)
    if comm.dead_ranks and not config.faults.tolerate:
        raise Fault(
            f"rank {', '.join(map(str, comm.dead_ranks))} died before the run began; start again"
        )
    return config, comm


def _broadcast_config(comm: Comm, read: Callable[[], Config]) -> Config:
    """The config that ``read()`` gives on rank 0, on every rank. Raises RankLost."""
    config = collectively(comm, lambda: read() if comm.rank == 0 else None)
    text = json.dumps(configs.resolved_dict(config)) if config is not None else ""
    return configs.from_dict(json.loads(comm.broadcast(text.encode())), "config of rank 0")


@contextmanager
def _hold_on_rank_0(comm: Comm, acquire: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Rank 0 holds the folder's lock; raises Refusal on all ranks when another run has it."""
    with ExitStack() as stack:
        collectively(comm, lambda: stack.enter_context(acquire()) if comm.rank == 0 else None)
        yield


def _replicate_if_tolerant(assembly: Assembly, state: State) -> tuple[Assembly, State]:
    """Both, with replicas in memory if the config tolerates the death of a worker."""
    return (
        replace(assembly, run=with_replicas(assembly.run, state))
        if assembly.config.faults.tolerate
        else assembly
    ), state


def _train(assembly: Assembly, state: State, folder: Path, stop_requests: Sequence[int]) -> int:
    """Train the rounds that are left, or until a stop request; returns the exit code."""
    config, comm = assembly.config, assembly.run.comm
    with ExitStack() as stack:
        log, sinks = collectively(
            comm, lambda: _open_log(config, folder, stack) if comm.rank == 0 else (None, [])
        )
        if log:
            for hint in run_hints(assembly):
                print(f"hint: {hint}", file=sys.stderr)
            if comm.dead_ranks:
                _report_rank_failure(
                    log,
                    f"{recovery_line(comm.dead_ranks, comm, state.round)}, from what was on disk",
                )
        state = _train_rounds(assembly, state, folder, stop_requests, log, sinks)
    is_done = state.round >= config.rounds
    if log:
        print(
            f"{escape_line(folder)}: "
            + (
                "done"
                if is_done
                else f"stopped after round {state.round}; continue with "
                f"'fedlora-mpi resume {escape_line(folder)}'"
            ),
            flush=True,
        )
    return 0 if is_done else STOPPED_EXIT


def _open_log(config: Config, folder: Path, stack: ExitStack) -> tuple[Log, list[Sink]]:
    """The log and the sinks beside it, closed with ``stack``. Raises ValueError, WriteError."""
    sinks = open_sinks(folder, csv=config.log.csv, tensorboard=config.log.tensorboard)
    for sink in sinks:
        stack.enter_context(closing(sink))
    log = stack.enter_context(Log.reopen(folder / "log.h5"))
    log.record_config(configs.checksummed_yaml(config), json.dumps(configs.resolved_dict(config)))
    return log, sinks


def _train_rounds(
    assembly: Assembly,
    state: State,
    folder: Path,
    stop_requests: Sequence[int],
    log: Log | None,
    sinks: Sequence[Sink],
) -> State:
    """Train until the last round or a stop request; returns the state.

    sinks: what is written beside the log.
    """
    config, progress = assembly.config, Progress(assembly.config.rounds, state.round)
    stop, saved_round, logged_round = False, state.round, state.round
    while True:
        try:
            is_done = stop or state.round >= config.rounds
            if saved_round < state.round and (
                is_done or state.round % config.checkpoint.every == 0
            ):
                save_checkpoint(assembly, folder, state)
                saved_round = state.round
            if is_done:
                if assembly.run.journal:
                    assembly.run.journal.close()
                return state
            evaluate = (
                state.round + 1 == config.rounds or (state.round + 1) % config.evaluate.every == 0
            )
            state, row, clients = run_round(assembly.run, state, evaluate, stop=bool(stop_requests))
            row |= (
                {"epsilon": assembly.run.epsilon(state.round)}
                if log and config.privacy.is_differential
                else {}
            )
            stop, logged_round = (
                row.pop("stop"),
                _log_round(log, sinks, progress, state.round, row, clients, logged_round),
            )
            if assembly.run.journal:
                assembly.run.journal.begin_round(state)
            if is_rebalancing_due(assembly.run, state.round):
                workers = worker_ranks(config, assembly.run.comm.size)
                run, state = rebalance(assembly.run, state, workers, config.mix)
                assembly = replace(assembly, run=run)
        except RankLost as lost:
            if not assembly.run.journal:
                raise

            def rebuild_run(comm):
                return build(config, str(folder / "config.yaml"), comm).run

            def worker_ranks_of(size):
                return worker_ranks(config, size)

            run, state, saved_round, line = recover(
                lost, assembly.run, saved_round, worker_ranks_of, config.mix, rebuild_run
            )
            assembly, stop = replace(assembly, run=run), False
            if log:
                _report_rank_failure(log, line)


def _report_rank_failure(log: Log, line: str) -> None:
    print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)
    log.record_rank_failure(line)


def _log_round(
    log: Log | None,
    sinks: Sequence[Sink],
    progress: Progress,
    round_: int,
    row: dict,
    clients: Mapping[str, np.ndarray],
    logged_round: int,
) -> int:
    """Log a round, unless a recovery replays one that is in the log; returns the newest logged."""
    if round_ <= logged_round:
        return logged_round
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
            row["skipped"] = len(row["skipped"])
        if ids := row.pop("nan_clients"):
            client_list, rest = (
                ", ".join(map(str, ids[:10])),
                f" and {len(ids) - 10} more" if len(ids) > 10 else "",
            )
            print(
                f"fedlora-mpi: round {round_}: client {client_list}{rest}: logits of test samples "
                "are no numbers (nan); these samples count as wrong, see nan_predictions of the "
                "log",
                file=sys.stderr,
            )
        ranks = row.pop("seconds_ranks")
        for sink in (log, *sinks):
            sink.append(round_, row, clients, ranks)
        progress.show(round_, row)
    return round_


def run_hints(assembly: Assembly) -> list[str]:
    """What would make this run faster on this node, for the user to decide, and what its low-rank
    parts leave out.
    """
    comm, engine, lines = assembly.run.comm, assembly.config.engine, []
    workers = len(set(assembly.run.rank_of_group))
    if workers < (available_workers := len(worker_ranks(assembly.config, comm.size))):
        lines.append(
            f"{len(assembly.run.groups)} groups of clients keep {workers} of {available_workers} "
            "workers busy; a smaller engine.group_size gives work to more (and changes rounding)"
        )
    local_workers = comm.local_size - (available_workers < comm.size)
    cores, used_cores = os.cpu_count() or 1, local_workers * engine.threads
    if engine.device == "cpu" and used_cores > cores:
        lines.append(
            f"{local_workers} workers with {engine.threads} thread(s) share {cores} cores; start "
            "fewer ranks"
        )
    elif (
        engine.device == "cpu"
        and used_cores <= cores // 2
        and available_workers < len(assembly.run.groups)
    ):
        lines.append(
            f"{used_cores} of {cores} cores are busy; mpirun -n {cores // engine.threads + 1} "
            "would use them all"
        )
    return lines + _decomposition_hints(assembly)


def _decomposition_hints(assembly: Assembly) -> list[str]:
    """Which weights have no low-rank part, where the config asks for one in all."""
    lines: list[str] = []
    algorithm = assembly.run.algorithm
    full_roles = getattr(algorithm, "full", ())
    if "*" not in getattr(algorithm, "layers", ()):
        return lines
    for network in sorted({kind.network for kind in assembly.run.kinds}):
        model = next(kind.trainer.model for kind in assembly.run.kinds if kind.network == network)
        low_rank = algorithm.low_rank(model)
        full_weights = [
            f"{name} ({why})"
            for name, why in skipped_weights(model, low_rank, full_roles).items()
            if model.role(name) not in full_roles
        ]
        if low_rank and full_weights:
            lines.append(
                f"{configs.algorithm_name(algorithm)} decomposes {len(low_rank)} of "
                f"{len(low_rank) + len(full_weights)} weights; not decomposed: "
                f"{join_first(full_weights)}; 'fedlora-mpi plan' lists them"
            )
    return lines


def _collect_stop_signals() -> list[int]:
    """A list that SIGUSR1 fills: the run then stops at the next round boundary, with a checkpoint.
    In another thread than the first, which gets no signals, it stays empty.
    """
    stop_requests: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda number, frame: stop_requests.append(number))
    return stop_requests
