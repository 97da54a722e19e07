"""The state of a run before round 1, into a checkpoint and out of it."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..core.escapes import escape_line
from ..core.names import stored_names
from ..core.tree import Tree, nbytes, tmap
from ..federation.federation import State
from ..mpi.ending import collectively
from ..store import checkpoint
from ..store.files import StoreError
from ..store.manifest import Shard, worker_file
from ..store.snapshot import Checkpoint
from .assembly import Assembly

_READ = 2**28  # bytes of a checkpoint in memory at once


def save(built: Assembly, folder: Path, state: State) -> None:
    """Write a checkpoint: every worker its clients, rank 0 the rest, the manifest last."""
    run, comm, home = built.run, built.run.comm, checkpoint.folder_of(folder, state.round)
    comm.heartbeat.enter_stage("the checkpoint")
    shards = np.zeros((comm.size, len(run.kinds), 3), np.int64)

    def write() -> list[Shard]:
        for number, (kind, ids) in enumerate(
            zip(run.kinds, run.local_clients_by_kind, strict=True)
        ):
            if ids:
                own = _arrays({n: state.personal[kind.prefix + n] for n in kind.initial.personal})
                shards[comm.rank, number] = checkpoint.write_clients(
                    home, comm.rank, ids, own, number
                ).numbers()
        if comm.rank:
            return []
        shared, server = _arrays(state.shared), _arrays(state.server)
        ours = checkpoint.write_server(home, round_=state.round, shared=shared, server=server)
        return [ours, checkpoint.copy_log(home, folder / "log.h5")]

    collectively(comm, lambda: checkpoint.begin(folder, state.round) if comm.rank == 0 else None)
    files = collectively(comm, write)
    comm.sum(shards)
    # nobody waits for what follows: a rank that dies from here on finds a whole checkpoint
    if comm.rank == 0:
        written = [
            (rank, kind) for rank, kind in np.ndindex(shards.shape[:2]) if shards[rank, kind].any()
        ]
        files = [*(Shard.from_numbers(worker_file(*at), shards[at]) for at in written), *files]
        checkpoint.commit(home, files, run_digest=built.digest, clients=len(run.weight_N))
        checkpoint.prune(folder, built.config.checkpoint.keep)


def beginning(built: Assembly) -> State:
    """The state before round 1."""
    run = built.run
    shared = tmap(lambda v: v.to(run.trainer.device, copy=True), run.kinds[0].initial.shared)
    personal = run.allocate_personal()
    for kind in run.kinds:
        for name, value in kind.initial.personal.items():
            personal[kind.prefix + name][:] = value
    run.personal_rows.release()
    return State(0, run.algorithm.server(run.trainer.model, shared), shared, personal)


def loaded(found: Checkpoint, built: Assembly) -> State:
    """The state of a checkpoint: this rank's clients, wherever they were hosted before."""
    run = built.run
    first, device, personal = (
        run.kinds[0].initial.shared,
        run.trainer.device,
        run.allocate_personal(),
    )
    blank = run.algorithm.server(run.trainer.model, first)
    _check_leaves(found, built, blank)
    for kind, ids in zip(run.kinds, run.local_clients_by_kind, strict=True):
        few = max(1, _READ // max(1, nbytes(kind.initial.personal)))
        for at in range(0, len(ids), few):
            rows = _leaves(found.personal(ids[at : at + few]), kind.initial.personal)
            for name, value in rows.items():
                personal[kind.prefix + name][at : at + few] = value
    run.personal_rows.release()
    server, shared = _leaves(found.server(), blank), _leaves(found.shared(), first)

    def to_device(tree):
        return tmap(lambda v: v.to(device), tree)

    return State(found.round, to_device(server), to_device(shared), personal)


def _check_leaves(found: Checkpoint, built: Assembly, blank: Tree) -> None:
    """Raise StoreError unless the checkpoint has the leaves of this network and method."""
    kinds = [
        (found.leaf_shapes(ids), kind.initial.personal)
        for kind, ids in zip(built.run.kinds, built.run.local_clients_by_kind, strict=True)
        if ids
    ]
    for stored, like in (
        (found.shapes("shared"), built.run.kinds[0].initial.shared),
        (found.shapes("server"), blank),
        *kinds,
    ):
        for name, array in _arrays(like).items():
            if stored.get(name) != (array.shape, array.dtype):
                said = f"{array.dtype} {list(array.shape)}"
                raise StoreError(
                    f"{found.path}: has no leaf {name!r} of {said}; it is damaged, or of another "
                    "experiment"
                )


def newest(folder: Path, built: Assembly) -> Checkpoint | None:
    """The newest valid checkpoint, as rank 0 finds it; None when none was ever committed."""
    comm = built.run.comm

    def find() -> int:
        if comm.rank != 0 or not checkpoint.committed(folder):
            return 0
        found, skipped = checkpoint.newest(folder, run_digest=built.digest)
        for line in (
            *(f"skipped {line}" for line in skipped),
            f"resuming {folder} after round {found.round}",
        ):
            print(escape_line(line), file=sys.stderr, flush=True)
        return found.round

    round_ = int(comm.broadcast(str(collectively(comm, find)).encode()))
    return (
        collectively(comm, lambda: Checkpoint.read(checkpoint.folder_of(folder, round_)))
        if round_
        else None
    )


def _arrays(tree: Tree) -> Mapping[str, np.ndarray]:
    """Leaves as numpy arrays by their names in files, without a copy on the CPU; of bfloat16, which
    numpy has not, as float32.
    """
    known = {
        n: v.detach().float() if v.dtype == torch.bfloat16 else v.detach() for n, v in tree.items()
    }
    return {name: known[n].cpu().numpy() for n, name in stored_names(tree).items()}


def _leaves(arrays: Mapping[str, np.ndarray], like: Tree) -> Tree:
    """The leaves that ``like`` has, in its order, of the arrays of a checkpoint."""
    return {
        n: torch.from_numpy(arrays[name]).to(like[n].dtype)
        for n, name in stored_names(like).items()
    }
