"""Save the state of a run to a checkpoint, load it, and make the state before round 1."""

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

_READ_BYTES = 2**28  # bytes of a checkpoint that are in memory at a time


def save_checkpoint(assembly: Assembly, folder: Path, state: State) -> None:
    """Write a checkpoint.

    Every worker writes its clients, rank 0 writes the rest, and the manifest last.
    """
    run, comm, checkpoint_folder = (
        assembly.run,
        assembly.run.comm,
        checkpoint.checkpoint_folder(folder, state.round),
    )
    comm.heartbeat.enter_stage("the checkpoint")
    shards = np.zeros((comm.size, len(run.kinds), 3), np.int64)

    def write() -> list[Shard]:
        for number, (kind, ids) in enumerate(
            zip(run.kinds, run.local_clients_by_kind, strict=True)
        ):
            if ids:
                personal = _to_arrays(
                    {n: state.personal[kind.prefix + n] for n in kind.initial.personal}
                )
                shards[comm.rank, number] = checkpoint.write_clients(
                    checkpoint_folder, comm.rank, ids, personal, number
                ).to_numbers()
        if comm.rank:
            return []
        shared, server = _to_arrays(state.shared), _to_arrays(state.server)
        server_shard = checkpoint.write_server(
            checkpoint_folder, round_=state.round, shared=shared, server=server
        )
        return [server_shard, checkpoint.copy_log(checkpoint_folder, folder / "log.h5")]

    collectively(comm, lambda: checkpoint.begin(folder, state.round) if comm.rank == 0 else None)
    server_shards = collectively(comm, write)
    comm.sum(shards)
    # no rank waits for what follows; the shards are complete even if another rank dies now
    if comm.rank == 0:
        written_shards = [
            (rank, kind) for rank, kind in np.ndindex(shards.shape[:2]) if shards[rank, kind].any()
        ]
        server_shards = [
            *(
                Shard.from_numbers(worker_file(*rank_and_kind), shards[rank_and_kind])
                for rank_and_kind in written_shards
            ),
            *server_shards,
        ]
        checkpoint.commit(
            checkpoint_folder,
            server_shards,
            run_digest=assembly.run_digest,
            clients=len(run.weight_N),
        )
        checkpoint.prune(folder, assembly.config.checkpoint.keep)


def initial_state(assembly: Assembly) -> State:
    """Return the state before round 1."""
    run = assembly.run
    shared = tmap(lambda v: v.to(run.trainer.device, copy=True), run.kinds[0].initial.shared)
    personal = run.allocate_personal()
    for kind in run.kinds:
        for name, value in kind.initial.personal.items():
            personal[kind.prefix + name][:] = value
    run.personal_rows.release()
    return State(0, run.algorithm.server(run.trainer.model, shared), shared, personal)


def load_state(snapshot: Checkpoint, assembly: Assembly) -> State:
    """Return the state of a checkpoint with this rank's clients, whichever rank saved them."""
    run = assembly.run
    initial_shared, device, personal = (
        run.kinds[0].initial.shared,
        run.trainer.device,
        run.allocate_personal(),
    )
    initial_server = run.algorithm.server(run.trainer.model, initial_shared)
    _check_leaves(snapshot, assembly, initial_server)
    for kind, ids in zip(run.kinds, run.local_clients_by_kind, strict=True):
        block_clients = max(1, _READ_BYTES // max(1, nbytes(kind.initial.personal)))
        for start in range(0, len(ids), block_clients):
            rows = _to_tree(
                snapshot.personal(ids[start : start + block_clients]), kind.initial.personal
            )
            for name, value in rows.items():
                personal[kind.prefix + name][start : start + block_clients] = value
    run.personal_rows.release()
    server, shared = (
        _to_tree(snapshot.server(), initial_server),
        _to_tree(snapshot.shared(), initial_shared),
    )

    def to_device(tree):
        return tmap(lambda v: v.to(device), tree)

    return State(snapshot.round, to_device(server), to_device(shared), personal)


def _check_leaves(snapshot: Checkpoint, assembly: Assembly, initial_server: Tree) -> None:
    """Raise StoreError unless the checkpoint has the leaves of this network and method."""
    kinds = [
        (snapshot.leaf_shapes(ids), kind.initial.personal)
        for kind, ids in zip(assembly.run.kinds, assembly.run.local_clients_by_kind, strict=True)
        if ids
    ]
    for stored, like in (
        (snapshot.shapes("shared"), assembly.run.kinds[0].initial.shared),
        (snapshot.shapes("server"), initial_server),
        *kinds,
    ):
        for name, array in _to_arrays(like).items():
            if stored.get(name) != (array.shape, array.dtype):
                description = f"{array.dtype} {list(array.shape)}"
                raise StoreError(
                    f"{snapshot.path}: has no leaf {name!r} of {description}; it is damaged, or of "
                    "another experiment"
                )


def find_newest(folder: Path, assembly: Assembly) -> Checkpoint | None:
    """Return the newest valid checkpoint, as rank 0 finds it; None if none was ever committed."""
    comm = assembly.run.comm

    def find_round() -> int:
        if comm.rank != 0 or not checkpoint.committed_rounds(folder):
            return 0
        snapshot, skipped = checkpoint.newest_valid(folder, run_digest=assembly.run_digest)
        for line in (
            *(f"skipped {line}" for line in skipped),
            f"resuming {folder} after round {snapshot.round}",
        ):
            print(escape_line(line), file=sys.stderr, flush=True)
        return snapshot.round

    round_ = int(comm.broadcast(str(collectively(comm, find_round)).encode()))
    return (
        collectively(comm, lambda: Checkpoint.read(checkpoint.checkpoint_folder(folder, round_)))
        if round_
        else None
    )


def _to_arrays(tree: Tree) -> Mapping[str, np.ndarray]:
    """Return the leaves as numpy arrays, by their names in files; without a copy on the CPU.

    bfloat16, which numpy lacks, becomes float32.
    """
    values = {
        n: v.detach().float() if v.dtype == torch.bfloat16 else v.detach() for n, v in tree.items()
    }
    return {name: values[n].cpu().numpy() for n, name in stored_names(tree).items()}


def _to_tree(arrays: Mapping[str, np.ndarray], like: Tree) -> Tree:
    """Return the leaves of a checkpoint as a tree with the names, order and types of ``like``."""
    return {
        n: torch.from_numpy(arrays[name]).to(like[n].dtype)
        for n, name in stored_names(like).items()
    }
