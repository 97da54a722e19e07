"""Start or resume a run: loop over rounds, log, checkpoint."""

import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from . import __version__
from . import config as configs
from .balance import balanced, due
from .build import Built, build, hosts
from .comm import Comm, Lost, together
from .config import Config
from .federation import Kind, Run, State
from .progress import Progress
from .recovery import going_on, keeping, lasting, without
from .round import play
from .store import checkpoint
from .store.files import StoreError, write_atomic
from .store.folder import created
from .store.lock import locked
from .store.log import Log, ragged
from .store.manifest import Shard, worker_file
from .store.sinks import Sink, opened
from .store.snapshot import Checkpoint
from .tree import Tree, nbytes, tmap
from .writing import writing

_READ = 2**28  # bytes of a checkpoint in memory at once
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may queue the job again


def start(config: Config, source: str, comm: Comm) -> int:
    """Train from round 1 into a new run folder; returns the exit code."""
    folder, asked = Path(config.output).expanduser(), _stop_signals()
    begin = lambda comm: _begin(folder, config, source, comm, asked)
    recorded = lambda comm: receive(comm, lambda: _continued(config, source, folder))
    again = lambda comm: _go_on(folder, recorded(comm), comm, asked) if _begun(folder, comm) else begin(comm)
    return lasting(config.faults, source, folder, comm, begin, again)


def _begin(folder: Path, config: Config, source: str, comm: Comm, asked: Sequence[int]) -> int:
    """Play all rounds into a new run folder; returns the exit code."""

    def refuse_existing() -> None:
        if comm.rank == 0 and folder.exists():
            raise ValueError(
                f"{source}: output = {folder}: the folder exists; continue it with "
                f"'fedlora-mpi resume {folder}' or choose another with output=..."
            )

    together(comm, refuse_existing)
    built = build(config, source, comm)
    with _alone(comm, lambda: created(folder, lambda draft: _fill(draft, built))):
        return _loop(*_protected(built, beginning(built)), folder, asked)


def start_or_resume(config: Config, source: str, comm: Comm) -> int:
    """Train until done whatever happened before; for a scheduler, which calls it again and again.

    Goes on with the run folder where there is one; settings that a resume may not change are refused.
    """
    folder = Path(config.output).expanduser()
    begun = receive(comm, lambda: _continued(config, source, folder)) if _begun(folder, comm) else None
    return _resumed(folder, begun, comm) if begun else start(config, source, comm)


def resume(folder: Path, overrides: Sequence[str], comm: Comm) -> int:
    """Continue a run from its newest valid checkpoint, on any number of ranks; returns the exit code.

    A run that was killed before its first checkpoint begins again.
    """
    return _resumed(folder, receive(comm, lambda: _recorded(folder, overrides)), comm)


def _resumed(folder: Path, config: Config, comm: Comm) -> int:
    asked = _stop_signals()
    go_on = lambda comm: _go_on(folder, config, comm, asked)
    return lasting(config.faults, str(folder / "config.yaml"), folder, comm, go_on, go_on)


def _go_on(folder: Path, config: Config, comm: Comm, asked: Sequence[int]) -> int:
    """Play the rounds of ``config`` that the folder does not have; returns the exit code."""
    built = build(config, str(folder / "config.yaml"), comm)
    together(comm, lambda: (_same_words(folder, built), _same_weights(folder, built)) if comm.rank == 0 else None)
    with _alone(comm, lambda: locked(folder)):
        found = _newest(folder, built)
        together(comm, lambda: _put_back(folder, found, built) if comm.rank == 0 else None)
        state = together(comm, lambda: _load(found, built)) if found else beginning(built)
        return _loop(*_protected(built, state), folder, asked)


def _put_back(folder: Path, found: Checkpoint | None, built: Built) -> None:
    """The folder's own files as they were at the checkpoint, or before round 1."""
    with writing(folder):
        _describe(folder, built)
        if found:
            found.restore_log(folder / "log.h5")
        else:
            (folder / "log.h5").unlink(missing_ok=True)
            _create_log(folder, built)


def receive(comm: Comm, read: Callable[[], Config]) -> Config:
    """The config that ``read()`` gives on rank 0, on every rank."""
    config = together(comm, lambda: read() if comm.rank == 0 else None)
    text = json.dumps(configs.resolved_dict(config)) if comm.rank == 0 else ""
    return configs.from_dict(json.loads(comm.broadcast(text.encode())), "config of rank 0")


@contextmanager
def _alone(comm: Comm, hold: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Rank 0 holds the folder's lock; raises Refused on all ranks when another run has it."""
    with ExitStack() as stack:
        together(comm, lambda: stack.enter_context(hold()) if comm.rank == 0 else None)
        yield


def _protected(built: Built, state: State) -> tuple[Built, State]:
    """Both, with copies in memory that outlive a worker where the config asks for it."""
    return (replace(built, run=keeping(built.run, state)) if built.config.faults.tolerate else built), state


def _loop(built: Built, state: State, folder: Path, asked: Sequence[int]) -> int:
    """Play the rounds that are left, or until somebody ``asked`` to stop; returns the exit code."""
    config, comm = built.config, built.run.comm
    with ExitStack() as stack:
        log, too = None, []
        if comm.rank == 0:
            too = opened(folder, csv=config.log.csv, tensorboard=config.log.tensorboard)
            for sink in too:
                stack.enter_context(closing(sink))
            log = stack.enter_context(Log.append_to(folder / "log.h5"))
            log.describe(configs.sealed_yaml(config), json.dumps(configs.resolved_dict(config)))
            for hint in hints(built):
                print(f"hint: {hint}", file=sys.stderr)
            if comm.dead:
                _tell_of_death(log, f"{going_on(comm.dead, comm, state.round)}, from what was on disk")
        state = _rounds(built, state, folder, asked, log, too)
    done = state.round >= config.rounds
    if log:
        print(f"{folder}: " + ("done" if done else f"stopped after round {state.round}; continue with "
              f"'fedlora-mpi resume {folder}'"), flush=True)
    return 0 if done else STOPPED


def _rounds(
    built: Built, state: State, folder: Path, asked: Sequence[int], log: Log | None, too: Sequence[Sink]
) -> State:
    """The state after the last round, or after the one in which somebody ``asked`` to stop; ``too``: written beside the
    log."""
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
            evaluate = state.round + 1 == config.rounds or (state.round + 1) % config.evaluate.every == 0
            state, row, clients = play(built.run, state, evaluate, stop=bool(asked))
            row |= {"epsilon": built.run.epsilon(state.round)} if log and config.privacy.differential else {}
            stop, logged = row.pop("stop"), _tell(log, too, progress, state.round, row, clients, logged)
            if built.run.journal:
                built.run.journal.turn(state)
            if due(built.run, state.round):
                workers = hosts(config, built.run.comm.size)
                run, state = balanced(built.run, state, workers, config.mix)
                built = replace(built, run=run)
        except Lost as lost:
            if not built.run.journal:
                raise
            alone = lambda comm: build(config, str(folder / "config.yaml"), comm).run
            workers = lambda size: hosts(config, size)
            run, state, saved, line = without(lost, built.run, saved, workers, config.mix, alone)
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
    """Log a round unless it was ``logged`` before a death made it be played again; returns the newest round logged."""
    if round_ <= logged:
        return logged
    if log:
        if skipped := row.get("skipped"):
            ids, rest = ", ".join(map(str, skipped)), "" if row["clients"] else "; nobody is left, the shared state stays"
            print(f"fedlora-mpi: round {round_}: skipped client {ids}: loss or upload is not finite{rest}", file=sys.stderr)
        if "skipped" in row:
            row["skipped"] = len(skipped)
        ranks = row.pop("seconds_ranks")
        for sink in (log, *too):
            sink.append(round_, row, clients, ranks)
        progress.tell(round_, row)
    return round_


def hints(built: Built) -> list[str]:
    """What would make this run faster on this node, for the user to decide."""
    comm, engine, found = built.run.comm, built.config.engine, []
    workers = len(set(built.run.host))
    if workers < (possible := len(hosts(built.config, comm.size))):
        found.append(
            f"{len(built.run.groups)} groups of clients keep {workers} of {possible} workers busy; "
            "a smaller engine.group_size gives work to more (and changes rounding)"
        )
    here = comm.local_size - (possible < comm.size)
    cores, busy = os.cpu_count() or 1, here * engine.threads
    if engine.device == "cpu" and busy > cores:
        found.append(f"{here} workers with {engine.threads} thread(s) share {cores} cores; start fewer ranks")
    elif engine.device == "cpu" and busy <= cores // 2 and possible < len(built.run.groups):
        found.append(f"{busy} of {cores} cores are busy; mpirun -n {cores // engine.threads + 1} would use them all")
    return found


def save(built: Built, folder: Path, state: State) -> None:
    """Write a checkpoint: every worker its clients, rank 0 the rest, the manifest last."""
    run, comm, home = built.run, built.run.comm, checkpoint.folder_of(folder, state.round)
    comm.pulse.at("the checkpoint")
    shards = np.zeros((comm.size, len(run.kinds), 3), np.int64)

    def write() -> list[Shard]:
        for number, (kind, ids) in enumerate(zip(run.kinds, run.by_kind)):
            if ids:
                own = _arrays({n: state.personal[kind.prefix + n] for n in kind.first.personal})
                shards[comm.rank, number] = checkpoint.write_clients(home, comm.rank, ids, own, number).numbers()
        if comm.rank:
            return []
        shared, server = _arrays(state.shared), _arrays(state.server)
        ours = checkpoint.write_server(home, round_=state.round, shared=shared, server=server)
        return [ours, checkpoint.copy_log(home, folder / "log.h5")]

    together(comm, lambda: checkpoint.begin(folder, state.round) if comm.rank == 0 else None)
    files = together(comm, write)
    comm.sum(shards)
    if comm.rank == 0:  # nobody waits for what follows: a rank that dies from here on finds a whole checkpoint
        written = [(rank, kind) for rank, kind in np.ndindex(shards.shape[:2]) if shards[rank, kind].any()]
        files = [*(Shard.from_numbers(worker_file(*at), shards[at]) for at in written), *files]
        checkpoint.commit(home, files, run_digest=built.digest, clients=len(run.weight_N))
        checkpoint.prune(folder, built.config.checkpoint.keep)


def beginning(built: Built) -> State:
    """The state before round 1."""
    run = built.run
    shared = tmap(lambda v: v.to(run.trainer.device, copy=True), run.kinds[0].first.shared)
    personal = {}
    for kind, ids in zip(run.kinds, run.by_kind):
        personal |= (leaves := _blank(run, kind, len(ids)))
        for name, rows in leaves.items():
            rows[:] = kind.first.personal[name.removeprefix(kind.prefix)]
    run.rows.release()
    return State(0, run.algorithm.server(run.trainer.model, shared), shared, personal)


def _blank(run: Run, kind: Kind, clients: int) -> Tree:
    """Room for the personal leaves of so many clients of a kind."""
    return {kind.prefix + name: run.rows.blank(clients, v) for name, v in kind.first.personal.items()}


def _load(found: Checkpoint, built: Built) -> State:
    """The state of a checkpoint: this rank's clients, wherever they were hosted before."""
    run = built.run
    first, device, personal = run.kinds[0].first.shared, run.trainer.device, {}
    blank = run.algorithm.server(run.trainer.model, first)
    in_order = lambda leaves, like: {name: torch.from_numpy(leaves[name]).to(device) for name in like}
    for kind, ids in zip(run.kinds, run.by_kind):
        personal |= (leaves := _blank(run, kind, len(ids)))
        few = max(1, _READ // max(1, nbytes(kind.first.personal)))
        for at in range(0, len(ids), few):
            for name, rows in found.personal(ids[at : at + few]).items():
                leaves[kind.prefix + name][at : at + few] = torch.from_numpy(rows)
    run.rows.release()
    return State(found.round, in_order(found.server(), blank), in_order(found.shared(), first), personal)


def _newest(folder: Path, built: Built) -> Checkpoint | None:
    """The newest valid checkpoint, as rank 0 finds it; None when none was ever committed."""
    comm = built.run.comm

    def find() -> int:
        if comm.rank != 0 or not checkpoint.committed(folder):
            return 0
        found, skipped = checkpoint.newest(folder, run_digest=built.digest)
        for line in (*(f"skipped {line}" for line in skipped), f"resuming {folder} after round {found.round}"):
            print(line, file=sys.stderr, flush=True)
        return found.round

    round_ = int(comm.broadcast(str(together(comm, find)).encode()))
    return together(comm, lambda: Checkpoint.read(checkpoint.folder_of(folder, round_))) if round_ else None


def _recorded(folder: Path, overrides: Sequence[str]) -> Config:
    """The config of a run folder."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: not a run folder, it has no config.yaml; give the output of a run")
    return configs.recorded(folder / "config.yaml", [*overrides, f"output={folder}"])


def _begun(folder: Path, comm: Comm) -> bool:
    """Whether the folder holds a run, as rank 0 sees it."""
    return comm.broadcast(b"1" if (folder / "config.yaml").is_file() else b"0") == b"1"


def _continued(config: Config, source: str, folder: Path) -> Config:
    """``config`` with the engine's ``auto`` as the run in ``folder`` has decided it.

    Raises ValueError where that run had other settings.
    """
    recorded = _recorded(folder, ())
    auto = [field.name for field in fields(config.engine) if getattr(config.engine, field.name) in ("auto", "measure")]
    if config.engine.path == "measure":
        auto.append("compile")
    engine = replace(config.engine, **{name: getattr(recorded.engine, name) for name in auto})
    config = replace(config, engine=engine, output=str(folder))
    if configs.digest(config) != configs.digest(recorded):
        was, now = configs.flat(recorded), configs.flat(config)
        key = next(k for k in was | now if was.get(k) != now.get(k) and not k.startswith(configs.FREE_ON_RESUME))
        raise ValueError(
            f"{source}: {key} = {now.get(key)}: the run in {folder} has {was.get(key)}; choose another output"
        )
    return config


def _same_words(folder: Path, built: Built) -> None:
    """Raise ValueError when the run began with another vocabulary than its data have now."""
    kept, source = folder / "vocabulary.json", built.config.data.source
    if built.vocabulary and kept.is_file() and kept.read_bytes() != built.vocabulary.json.encode():
        if source.text.tokenizer:
            raise ValueError(
                f"{kept}: is not that of data.text.tokenizer = {source.text.tokenizer}, which has changed since the "
                "run began: put back what was, or start anew (if this copy is damaged, remove it)"
            )
        raise ValueError(
            f"{kept}: is not that of the training texts in data.root = {source.root}; they, or the "
            "library tokenizers, have changed since the run began: put back what was, or start anew (if this copy is "
            "damaged, remove it)"
        )


def _same_weights(folder: Path, built: Built) -> None:
    """Raise ValueError when the newest checkpoint began with other files of a network than there are now."""
    origins = [origin for network in built.config.model.mix for origin in network.origins]
    rounds = checkpoint.committed(folder)
    if not (origins and rounds):
        return
    try:
        found = Checkpoint.read(checkpoint.folder_of(folder, rounds[-1]))
    except StoreError:
        return  # ``_newest`` tells of it
    first = -len(origins)  # their parts of a digest are the last
    was, now = (digest.split("-") for digest in (found.manifest.run_digest, built.digest))
    if was[:first] == now[:first] and was != now:
        changed = next(origin for origin, a, b in zip(origins, was[first:], now[first:]) if a != b)
        raise ValueError(
            f"{folder / 'config.yaml'}: model.{changed.key} = {changed.given}: has changed since the run began: "
            "put back what was, or start anew"
        )


def _fill(folder: Path, built: Built) -> None:
    """What a new run folder holds: the resolved config and an empty log."""
    _describe(folder, built)
    _create_log(folder, built)


def _describe(folder: Path, built: Built) -> None:
    """The resolved config, the layers of networks of Hugging Face and, for texts, the vocabulary."""
    for name, text in ({"config.yaml": configs.sealed_yaml(built.config)} | _beside(built)).items():
        write_atomic(folder / name, text.encode())


def _beside(built: Built) -> dict[str, str]:
    """The files that a run folder has for ``open_run``, by name."""
    found = {}
    for number, network in enumerate(built.config.model.mix):
        for described in (file for origin in network.origins for file in origin.files if file.suffix == ".json"):
            found[f"network-{number}.json"] = described.read_text(encoding="utf-8")
    return found | ({"vocabulary.json": built.vocabulary.json} if built.vocabulary else {})


def _create_log(folder: Path, built: Built) -> None:
    split = built.split
    Log.create(
        folder / "log.h5",
        config_yaml=configs.sealed_yaml(built.config),
        config_json=json.dumps(configs.resolved_dict(built.config)),
        versions=_versions(),
        clients=len(split.train),
        beside=_beside(built),
        partition={
            **ragged("train", split.train),
            **ragged("test", split.test),
            "train_counts": split.train_counts,
            "test_counts": split.test_counts,
            "input_shape": np.array(built.shape, np.int64),
            "input_tokens": np.array([built.vocabulary.size if built.vocabulary else 0], np.int64),
            "input_padding": np.array([built.vocabulary.padding if built.vocabulary else 0], np.int64),
            "digest": split.digest(),
        },
    ).close()


def _versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"fedlora_mpi": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "mpi4py", "h5py", "torchvision", "tokenizers", "transformers", "dp-accounting"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _arrays(tree: Tree) -> Mapping[str, np.ndarray]:
    """Leaves as numpy arrays, without a copy on the CPU."""
    return {n: v.detach().cpu().numpy() for n, v in tree.items()}


def _stop_signals() -> list[int]:
    """A list that SIGUSR1 fills: the run then stops at the next round boundary, with a checkpoint."""
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    return asked
