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
    federation, comm = assembly.federation, assembly.federation.comm
    checkpoint_folder = checkpoint.checkpoint_folder(folder, state.round)
    clients = federation.clients
    comm.heartbeat.enter_stage("the checkpoint")
    shards = np.zeros((comm.size, len(clients.types), 3), np.int64)

    def write() -> list[Shard]:
        for number, (client_type, ids) in enumerate(
            zip(clients.types, federation.placement.local_clients_by_type, strict=True)
        ):
            if ids:
                personal = _to_arrays(
                    {
                        n: state.personal[client_type.prefix + n]
                        for n in client_type.initial.personal
                    }
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
            (rank, number)
            for rank, number in np.ndindex(shards.shape[:2])
            if shards[rank, number].any()
        ]
        server_shards = [
            *(
                Shard.from_numbers(worker_file(*rank_and_type), shards[rank_and_type])
                for rank_and_type in written_shards
            ),
            *server_shards,
        ]
        checkpoint.commit(
            checkpoint_folder,
            server_shards,
            run_digest=assembly.run_digest,
            clients=len(clients),
        )
        checkpoint.prune(folder, assembly.config.checkpoint.keep)


def initial_state(assembly: Assembly) -> State:
    """Return the state before round 1."""
    federation, clients = assembly.federation, assembly.federation.clients
    first, trainer = clients.types[0], clients.trainer
    shared = tmap(lambda v: v.to(trainer.device, copy=True), first.initial.shared)
    personal = federation.store.allocate()
    for client_type in clients.types:
        for name, value in client_type.initial.personal.items():
            personal[client_type.prefix + name][:] = value
    federation.store.release()
    return State(0, federation.algorithm.server(trainer.model, shared), shared, personal)


def load_state(snapshot: Checkpoint, assembly: Assembly) -> State:
    """Return the state of a checkpoint with this rank's clients, whichever rank saved them."""
    federation, clients = assembly.federation, assembly.federation.clients
    initial_shared, trainer = clients.types[0].initial.shared, clients.trainer
    initial_server = federation.algorithm.server(trainer.model, initial_shared)
    _check_leaves(snapshot, assembly, initial_server)
    personal = federation.store.allocate()
    for client_type, ids in zip(
        clients.types, federation.placement.local_clients_by_type, strict=True
    ):
        like, prefix = client_type.initial.personal, client_type.prefix
        block_clients = max(1, _READ_BYTES // max(1, nbytes(like)))
        for start in range(0, len(ids), block_clients):
            rows = _to_tree(snapshot.personal(ids[start : start + block_clients]), like)
            for name, value in rows.items():
                personal[prefix + name][start : start + block_clients] = value
    federation.store.release()
    # an earlier version kept some of the server's leaves among the shared ones
    server = _to_tree(snapshot.shared() | snapshot.server(), initial_server)
    shared = _to_tree(snapshot.shared(), initial_shared)

    def to_device(tree):
        return tmap(lambda v: v.to(trainer.device), tree)

    return State(snapshot.round, to_device(server), to_device(shared), personal)


def _check_leaves(snapshot: Checkpoint, assembly: Assembly, initial_server: Tree) -> None:
    """Raise StoreError unless the checkpoint has the leaves of this network and method."""
    clients, placement = assembly.federation.clients, assembly.federation.placement
    personal = [
        (snapshot.leaf_shapes(ids), client_type.initial.personal)
        for client_type, ids in zip(clients.types, placement.local_clients_by_type, strict=True)
        if ids
    ]
    for stored, like in (
        (snapshot.shapes("shared"), clients.types[0].initial.shared),
        (snapshot.shapes("shared") | snapshot.shapes("server"), initial_server),
        *personal,
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
    comm = assembly.federation.comm

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
