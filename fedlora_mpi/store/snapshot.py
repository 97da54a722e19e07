"""Read one committed checkpoint: on any number of ranks, or for an analysis, without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np

from . import hdf5, manifest, schema
from .files import StoreError, copy_atomic
from .hdf5 import escape, unescape
from .manifest import Manifest, is_worker_file, run_folder_of


def checkpoint_folder(run: Path, round_: int) -> Path:
    """Return the folder of a round's checkpoint, whether it exists or not."""
    return Path(run) / "checkpoints" / f"{round_:06d}"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; ``read`` trusts the files, ``verify`` checks them."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Return the checkpoint in ``folder``; only its manifest is read. Raises StoreError."""
        return cls(Path(folder), Manifest.read(Path(folder)))

    @property
    def round(self) -> int:
        """The round after which it was written."""
        return self.manifest.round

    @property
    def log_path(self) -> Path:
        """The log as it was at this round."""
        return self.path / "log.h5"

    def restore_log(self, log_path: Path) -> None:
        """Restore the log of this round."""
        copy_atomic(self.log_path, Path(log_path), run_folder_of(self.path))

    def verify(self, run_digest: str | None = None) -> None:
        """Raise StoreError unless every file matches the manifest.

        run_digest: if given, the checkpoint must belong to this config.
        """
        if run_digest not in (None, self.manifest.run_digest):
            raise StoreError(
                f"{self.path}: of another config ({self.manifest.run_digest}, not {run_digest})"
            )
        for shard in self.manifest.files:
            shard.verify(self.path)
        stored_ids = np.sort(np.concatenate([np.arange(0), *self._ids_by_shard.values()]))
        if (
            len(stored_ids) != self.manifest.clients
            or (stored_ids != np.arange(len(stored_ids))).any()
        ):
            contradiction = f"{self.manifest.clients} clients, its files hold {len(stored_ids)}"
            raise StoreError(f"{self.path / manifest.NAME}: {contradiction}")
        self._leaves_by_shard  # noqa: B018  # raises StoreError if leaves are missing
        if (stored_round := self.attrs().get("round")) != self.round:
            raise StoreError(
                f"{self.path / 'server.h5'}: of round {stored_round}, in a checkpoint of round "
                f"{self.round}"
            )
        self.shapes("shared"), self.shapes("server")

    def _open(self, name: str) -> h5py.File:
        """Open one file of the checkpoint. Raises StoreError."""
        return hdf5.open_file(self.path / name, root=run_folder_of(self.path))

    def attrs(self) -> dict[str, str | int | float]:
        """Return the attributes given to ``write_server``, including the round."""
        with self._open("server.h5") as file:
            return schema.read_attributes(file)

    def shared(self) -> dict[str, np.ndarray]:
        """Return the shared leaves, in the order in which they were written."""
        return self._server_group("shared")

    def server(self) -> dict[str, np.ndarray]:
        """Return the server's own leaves, in the order in which they were written."""
        return self._server_group("server")

    def _server_group(self, name_of_group: str) -> dict[str, np.ndarray]:
        with self._open("server.h5") as file:
            return {
                unescape(name): hdf5.read(schema.find_dataset(file[name_of_group], name, 0))
                for name in schema.find_group(file, name_of_group)
            }

    def shapes(self, group: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return shape and dtype of each leaf of ``group``, which is "shared" or "server".

        Raises StoreError.
        """
        with self._open("server.h5") as file:
            leaves = schema.find_group(file, group)
            tables = {unescape(name): schema.find_dataset(leaves, name, 0) for name in leaves}
            return {name: (dataset.shape, dataset.dtype) for name, dataset in tables.items()}

    def client_ids(self) -> list[int]:
        """Return the clients whose personal leaves are stored: 0 .. N - 1."""
        return list(range(self.manifest.clients))

    def leaf_names(self, client_ids: Sequence[int] = ()) -> list[str]:
        """Return the personal leaves that these clients (default: all) have in the same shape.

        They are in the order in which they were written. Raises StoreError for a client that is not
        stored.
        """
        return list(self._common_shapes(np.asarray(client_ids, np.int64)))

    def leaf_shapes(self, client_ids: Sequence[int]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return shape (for one client) and dtype of each of ``leaf_names``. Raises StoreError."""
        return self._common_shapes(np.asarray(client_ids, np.int64))

    @cached_property
    def _ids_by_shard(self) -> dict[str, np.ndarray]:
        """Per shard the ids of its clients, ascending: row r is client ids[r]."""
        names = [shard.name for shard in self.manifest.files if is_worker_file(shard.name)]
        ids_by_shard = {}
        for name in names:
            with self._open(name) as file:
                ids = hdf5.read(schema.find_dataset(file, "client_id", 1, integers=True))
                if ids.ndim != 1 or (np.diff(ids) <= 0).any():
                    raise StoreError(
                        f"{self.path / name}: client_id is no list of ascending numbers"
                    )
                if len(ids):
                    ids_by_shard[name] = ids.astype(np.int64)
        return ids_by_shard

    @cached_property
    def _leaves_by_shard(self) -> dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]]:
        """Per shard the shape (for one client) and dtype of each leaf."""
        leaves_by_shard = {}
        for name, ids in self._ids_by_shard.items():
            with self._open(name) as file:
                leaves = schema.find_group(file, "personal")
                tables = {leaf: schema.find_dataset(leaves, leaf, 1, len(ids)) for leaf in leaves}
                leaves_by_shard[name] = {
                    unescape(leaf): (dataset.shape[1:], dataset.dtype)
                    for leaf, dataset in tables.items()
                }
        return leaves_by_shard

    def _common_shapes(self, client_ids: np.ndarray) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return the leaves that all these clients have in the same shape."""
        if len(unknown_ids := client_ids[(client_ids < 0) | (client_ids >= self.manifest.clients)]):
            raise StoreError(
                f"{self.path}: holds no client or leaf {unknown_ids.min()}; it is of another "
                "experiment"
            )

        def is_requested(ids):
            return not len(client_ids) or np.isin(ids, client_ids).any()

        shard_leaves = [
            self._leaves_by_shard[name].items()
            for name, ids in self._ids_by_shard.items()
            if is_requested(ids)
        ]
        return (
            {
                leaf: v
                for leaf, v in shard_leaves[0]
                if all((leaf, v) in other for other in shard_leaves)
            }
            if shard_leaves
            else {}
        )

    def personal(
        self, client_ids: Sequence[int], leaves: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the personal leaves [len(client_ids), ...] of these clients, in this order.

        leaves: by default those that all these clients have in the same shape. Only the rows of
        these clients are read. Raises StoreError for a client or a leaf that is not stored.
        """
        requested_ids = np.asarray(client_ids, np.int64)
        shapes = self._common_shapes(requested_ids)
        leaves = list(shapes) if leaves is None else leaves
        if missing_leaves := sorted({*leaves} - {*shapes}):
            raise StoreError(
                f"{self.path}: holds no client or leaf {missing_leaves[0]!r}; it is of another "
                "experiment"
            )
        out = {
            leaf: np.empty((len(requested_ids), *shapes[leaf][0]), shapes[leaf][1])
            for leaf in leaves
        }
        for name, ids in self._ids_by_shard.items():
            positions = np.flatnonzero(np.isin(requested_ids, ids))
            if not len(positions):
                continue
            rows = np.searchsorted(ids, requested_ids[positions])
            with self._open(name) as file:
                for leaf in leaves:
                    hdf5.read_rows(file["personal"][escape(leaf)], rows, out[leaf], positions)
        return out

    def digest(self) -> dict[str, str]:
        """Return {"shared", "personal"}: SHA-256 over name, dtype, shape and bytes of the leaves.

        The leaves are sorted by name. Personal leaves are [N, ...] in client order, so the digest
        does not depend on the shards. They are read in blocks. Clients whose leaves differ in shape
        form separate arrays, in the order of their first clients.
        """
        shared, personal = sha256(), sha256()
        for leaf, value in sorted(self.shared().items()):
            shared.update(f"{leaf}\0{value.dtype.str}\0{value.shape}\0".encode() + value.tobytes())
        for ids, leaves in self._clients_by_shapes():
            for leaf, (shape, dtype) in leaves:
                personal.update(f"{leaf}\0{dtype.str}\0{(len(ids), *shape)}\0".encode())
                block = max(1, 4 * hdf5.BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape)))
                for start in range(0, len(ids), block):
                    personal.update(
                        self.personal(ids[start : start + block], [leaf])[leaf].tobytes()
                    )
        return {"shared": shared.hexdigest(), "personal": personal.hexdigest()}

    def _clients_by_shapes(self) -> list[tuple[list[int], tuple]]:
        """Return (clients, their leaves by name) for each set of clients with equal leaf shapes."""
        clients_by_shapes: dict[tuple, list[int]] = {}
        for name, ids in self._ids_by_shard.items():
            clients_by_shapes.setdefault(
                tuple(sorted(self._leaves_by_shard[name].items())), []
            ).extend(ids.tolist())
        return sorted(
            ((sorted(ids), leaves) for leaves, ids in clients_by_shapes.items()),
            key=lambda kind: kind[0],
        )
