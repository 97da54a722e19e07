"""Start or resume a run: loop over rounds, log, checkpoint."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import config as configs
from ..config import Config
from ..core.disk_errors import explain_write_errors
from ..core.escapes import escape_line
from ..core.losses import CROSS_ENTROPY
from ..core.paths import expand_home
from ..federation.federation import State
from ..federation.round import run_round
from ..mpi.comm import Comm
from ..mpi.ending import Fault, collectively
from ..mpi.pending import RankLost
from ..resilience.rebalancing import is_rebalancing_due, rebalance
from ..resilience.recovery import (
    Survival,
    Training,
    begin_round,
    end_run,
    recovery_line,
    run_tolerant,
    surviving_comm,
    train_to_end,
    with_replicas,
)
from ..store import nolinks, replacing
from ..store.lock import hold_lock
from ..store.log import Log
from ..store.run_folder import create_run_folder
from ..store.sinks import Sink, open_sinks
from ..store.snapshot import Checkpoint
from .assembly import Assembly, build
from .checkpointing import find_newest, initial_state, load_state, save_checkpoint
from .engine_choice import worker_ranks
from .hints import run_hints, training_hints
from .output import (
    adopt_recorded_engine,
    check_shared_folder,
    check_unchanged,
    config_to_resume,
    create_log,
    fill_run_folder,
    run_exists,
    write_descriptions,
)
from .progress import Progress
from .stopping import StopRequests, collect_interrupts, collect_stop_signals, lost_rounds_line

STOPPED_EXIT = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may queue the job again


def start(
    config: Config, source: str, comm: Comm, overwrite: bool = False, quiet: bool = False
) -> int:
    """Train from round 1 into a new run folder; returns the exit code.

    overwrite: a run folder of the same name is replaced, once this one can begin; quiet: neither
    the rounds nor the end are printed.
    """
    folder, stop_requests = expand_home(config.output), collect_stop_signals()
    created: list[Path] = []  # on rank 0, which a run does not outlive

    def start_anew(comm):
        return _start_new_run(
            folder, config, source, comm, stop_requests, overwrite, created, quiet
        )

    def start_or_continue(comm):
        if overwrite and comm.broadcast(b"1" if created else b"0") == b"0":
            return start_anew(comm)
        return _start_or_continue(folder, config, source, comm, stop_requests, quiet)

    return run_tolerant(config.faults, source, folder, comm, start_anew, start_or_continue)


def _start_or_continue(
    folder: Path,
    config: Config,
    source: str,
    comm: Comm,
    stop_requests: StopRequests,
    quiet: bool,
) -> int:
    """Train the rounds after the newest checkpoint, or all into a new folder."""
    if not run_exists(folder, comm):
        return _start_new_run(folder, config, source, comm, stop_requests, quiet=quiet)
    recorded = _broadcast_config(comm, lambda: adopt_recorded_engine(config, source, folder))
    return _continue_run(folder, recorded, comm, stop_requests, quiet)


def _start_new_run(
    folder: Path,
    config: Config,
    source: str,
    comm: Comm,
    stop_requests: StopRequests,
    overwrite: bool = False,
    created: list[Path] | None = None,
    quiet: bool = False,
) -> int:
    """Train all rounds into a new run folder; returns the exit code.

    created: gets the folder when it is there. A run that has finished no round is replaced too.
    """

    def check_room() -> bool:
        if comm.rank != 0 or not os.path.lexists(folder):
            return False
        if overwrite:
            replacing.check_replaceable(folder)
        elif not folder.is_dir():
            raise ValueError(
                f"{source}: output = {folder}: is no folder; choose another with output=..."
            )
        elif not replacing.has_no_round(folder):
            raise ValueError(
                f"{source}: output = {folder}: the folder exists; continue it with 'fedlora-mpi "
                f"resume {folder}', choose another with output=..., or replace it with --overwrite"
            )
        else:
            line = f"{folder}: replaces a run that has finished no round"
            print(f"fedlora-mpi: {escape_line(line)}", file=sys.stderr, flush=True)
        return True

    replaces = collectively(comm, check_room)
    assembly = build(config, source, comm)
    check_shared_folder(folder, comm)

    def make_room() -> AbstractContextManager:
        return replacing.set_aside(folder) if replaces else nullcontext()

    with _hold_on_rank_0(
        comm,
        lambda: create_run_folder(
            folder, lambda draft: fill_run_folder(draft, assembly), make_room
        ),
    ):
        if created is not None:
            created.append(folder)
        state = collectively(comm, lambda: initial_state(assembly))
        return _train(assembly, state, folder, stop_requests, quiet)


def start_or_resume(config: Config, source: str, comm: Comm, quiet: bool = False) -> int:
    """Start the run, or continue its folder if it exists; a scheduler calls this until it is done.

    Refuses to continue with settings that a resume may not change. quiet: as in ``start``.
    """
    folder, stop_requests = expand_home(config.output), collect_stop_signals()

    def start_or_continue(comm):
        return _start_or_continue(folder, config, source, comm, stop_requests, quiet)

    return run_tolerant(config.faults, source, folder, comm, start_or_continue, start_or_continue)


def resume(folder: Path, overrides: Sequence[str], comm: Comm, quiet: bool = False) -> int:
    """Continue a run from its newest valid checkpoint; returns the exit code.

    The number of ranks may differ. A run without a checkpoint begins again. quiet: as in ``start``.
    """
    config, comm = receive_config(comm, lambda: config_to_resume(folder, overrides))
    stop_requests = collect_stop_signals()

    def go_on(comm):
        return _continue_run(folder, config, comm, stop_requests, quiet)

    return run_tolerant(config.faults, str(folder / "config.yaml"), folder, comm, go_on, go_on)


def _continue_run(
    folder: Path, config: Config, comm: Comm, stop_requests: StopRequests, quiet: bool
) -> int:
    """Train the rounds of ``config`` that the folder does not have; returns the exit code."""
    assembly = build(config, str(folder / "config.yaml"), comm)
    check_shared_folder(folder, comm)
    collectively(comm, lambda: check_unchanged(folder, assembly) if comm.rank == 0 else None)
    with _hold_on_rank_0(comm, lambda: hold_lock(folder)):
        snapshot = find_newest(folder, assembly)
        if snapshot and snapshot.round > config.rounds:
            if comm.rank == 0:
                line = f"rounds = {config.rounds}: {folder} has {snapshot.round} rounds already"
                print(f"fedlora-mpi: {escape_line(line)}; nothing is changed", file=sys.stderr)
            return 0
        collectively(
            comm, lambda: _restore_files(folder, snapshot, assembly) if comm.rank == 0 else None
        )
        state = (
            collectively(comm, lambda: load_state(snapshot, assembly))
            if snapshot
            else collectively(comm, lambda: initial_state(assembly))
        )
        return _train(assembly, state, folder, stop_requests, quiet)


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
    text = ""
    if config is not None:
        text = json.dumps([configs.resolved_dict(config), config.resets])
    tree, resets = json.loads(comm.broadcast(text.encode()))
    return replace(configs.from_dict(tree, "config of rank 0"), resets=tuple(resets))


@contextmanager
def _hold_on_rank_0(comm: Comm, acquire: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Rank 0 holds the folder's lock; raises Refusal on all ranks when another run has it."""
    with ExitStack() as stack:
        collectively(comm, lambda: stack.enter_context(acquire()) if comm.rank == 0 else None)
        yield


def _train(
    assembly: Assembly, state: State, folder: Path, stop_requests: StopRequests, quiet: bool
) -> int:
    """Train the rounds that are left, or until a stop request; returns the exit code."""
    config, comm = assembly.config, assembly.federation.comm
    federation = assembly.federation
    if config.faults.tolerate:
        federation = with_replicas(federation, state)
    with ExitStack() as stack:
        log, sinks = collectively(
            comm, lambda: _open_log(config, folder, stack) if comm.rank == 0 else (None, [])
        )
        if log:
            doubts = training_hints(assembly)
            resets = () if state.round else config.resets
            for hint in [*resets, *doubts, *run_hints(assembly)]:
                print(f"hint: {hint}", file=sys.stderr)
            log.record_hints(doubts)
            if comm.dead_ranks:
                line = recovery_line(comm.dead_ranks, comm, state.round)
                _report_rank_failure(log, f"{line}, from what was on disk")
        test_loss = () if config.model.loss == CROSS_ENTROPY.name else ("loss",)
        scores = (*test_loss, *config.evaluate.metrics)
        progress = None if quiet else Progress(config.rounds, state.round, scores)
        rounds = _Rounds(assembly, folder, stop_requests, log, sinks, state.round, progress)
        survival = Survival(
            lambda size: worker_ranks(config, size),
            config.mix,
            lambda comm: build(config, str(folder / "config.yaml"), comm).federation,
            rounds.tell_recovery,
        )
        training = Training(federation, state, saved_round=state.round)
        with collect_interrupts(stop_requests, rounds.lost_line, tells=log is not None):
            state = train_to_end(training, rounds.advance, survival)
    is_done = state.round >= config.rounds
    if log and not quiet:
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


class _Rounds:
    """The steps of a run's loop, with its files and messages.

    log: on rank 0 alone; sinks: what is written beside it; first_round: rounds done before;
    progress: prints the rounds.
    """

    def __init__(
        self,
        assembly: Assembly,
        folder: Path,
        stop_requests: StopRequests,
        log: Log | None,
        sinks: Sequence[Sink],
        first_round: int,
        progress: Progress | None,
    ) -> None:
        self._assembly, self._config, self._folder = assembly, assembly.config, folder
        self._stop_requests, self._log, self._sinks = stop_requests, log, sinks
        self._progress = progress
        self._logged_round, self._stops = first_round, False
        self._told_metrics: set[str] = set()

    def advance(self, training: Training) -> Training:
        """The next step: a checkpoint if one is due, else a round, or the end.

        Raises RankLost; ``training`` is then as before.
        """
        config, (federation, state, saved_round, _) = self._config, training
        is_alone_and_asked = federation.comm.size == 1 and bool(self._stop_requests)
        is_last = self._stops or is_alone_and_asked or state.round >= config.rounds
        if saved_round < state.round and (is_last or state.round % config.checkpoint.every == 0):
            save_checkpoint(replace(self._assembly, federation=federation), self._folder, state)
            return training._replace(saved_round=state.round)
        if is_last:
            end_run(training)
            return training._replace(is_done=True)
        round_ = state.round + 1
        evaluate = round_ == config.rounds or round_ % config.evaluate.every == 0
        state, row, clients = run_round(federation, state, evaluate, self._stop_requests)
        if self._log and config.privacy.is_differential:
            row["epsilon"] = federation.cohorts.epsilon(round_)
        self._stops = row.pop("stop")
        self._log_round(round_, row, clients)
        training = training._replace(state=state)
        begin_round(training)
        if is_rebalancing_due(federation, round_):
            workers = worker_ranks(config, federation.comm.size)
            federation, state = rebalance(federation, state, workers, config.mix)
        return training._replace(federation=federation, state=state)

    def lost_line(self) -> str:
        """Which rounds are lost if the run ends now."""
        return lost_rounds_line(self._folder, self._logged_round, self._config.rounds)

    def tell_recovery(self, line: str) -> None:
        """Report a recovery after a rank failure; the rounds that follow may still be stopped."""
        self._stops = False
        if self._log:
            _report_rank_failure(self._log, line)

    def _log_round(self, round_: int, row: dict, clients: Mapping[str, np.ndarray]) -> None:
        """Log a round, unless a recovery replays one that is in the log."""
        if round_ <= self._logged_round:
            return
        self._logged_round = round_
        if not self._log:
            return
        _warn_of_numbers(round_, row)
        self._tell_metrics(row.pop("undefined_metrics", {}))
        if "skipped" in row:
            row["skipped"] = len(row["skipped"])
        del row["nan_clients"]
        ranks = row.pop("seconds_ranks")
        for sink in (self._log, *self._sinks):
            sink.append(round_, row, clients, ranks)
        if self._progress:
            self._progress.show(round_, row)

    def _tell_metrics(self, undefined: Mapping[str, Sequence[int]]) -> None:
        """Say on stderr, once, which clients have no value of a metric."""
        for name, clients in undefined.items():
            if clients and name not in self._told_metrics:
                self._told_metrics.add(name)
                print(
                    f"hint: evaluate.metrics = {name}: has no value for client "
                    f"{_join_ids(clients)} (its test samples are all of one class, or an output "
                    "is not finite); the mean is over the other clients",
                    file=sys.stderr,
                )


def _report_rank_failure(log: Log, line: str) -> None:
    print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)
    log.record_rank_failure(line)


def _join_ids(clients: Sequence[int]) -> str:
    """The first ten clients, and how many more there are."""
    rest = f" and {len(clients) - 10} more" if len(clients) > 10 else ""
    return ", ".join(map(str, clients[:10])) + rest


def _warn_of_numbers(round_: int, row: dict) -> None:
    """Say on stderr which clients of a round were skipped or predict no numbers, and that nobody
    has moved the shared variables.
    """
    if ids := row.get("skipped"):
        rest = "" if row["clients"] else "; nobody is left, the shared state stays"
        print(
            f"fedlora-mpi: round {round_}: skipped client {', '.join(map(str, ids))}: loss or "
            f"upload is not finite{rest}",
            file=sys.stderr,
        )
    if round_ == 1 and row["drift"] == 0:
        print(
            "hint: round 1: the drift is exactly 0, so no client has moved what all share; do its "
            "phases train it?",
            file=sys.stderr,
        )
    if ids := row["nan_clients"]:
        print(
            f"fedlora-mpi: round {round_}: client {_join_ids(ids)}: logits of "
            "test samples are no numbers (nan); these samples count as wrong, see nan_predictions "
            "of the log",
            file=sys.stderr,
        )
