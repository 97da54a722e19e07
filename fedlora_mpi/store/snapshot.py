"""One committed checkpoint, read: by any number of ranks, by an analysis, without torch."""

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
from .manifest import Manifest, is_worker_file, run_of


def folder_of(run: Path, round_: int) -> Path:
    """Where the checkpoint of a round is, or would be."""
    return Path(run) / "checkpoints" / f"{round_:06d}"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; ``read`` trusts the files, ``verify`` does not."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in ``folder``, its manifest read. Raises StoreError."""
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
        """Put the log back to this round."""
        copy_atomic(self.log_path, Path(log_path), run_of(self.path))

    def verify(self, run_digest: str | None = None) -> None:
        """Raise StoreError unless every file is as recorded and, when given, the config is this
        one.
        """
        if run_digest not in (None, self.manifest.run_digest):
            raise StoreError(
                f"{self.path}: of another config ({self.manifest.run_digest}, not {run_digest})"
            )
        for shard in self.manifest.files:
            shard.verify(self.path)
        held = np.sort(np.concatenate([np.arange(0), *self._owned.values()]))
        if len(held) != self.manifest.clients or (held != np.arange(len(held))).any():
            here = f"{self.manifest.clients} clients, its files hold {len(held)}"
            raise StoreError(f"{self.path / manifest.NAME}: {here}")
        self._held  # noqa: B018  # have the files the leaves that they must have?
        if (written := self.attrs().get("round")) != self.round:
            raise StoreError(
                f"{self.path / 'server.h5'}: of round {written}, in a checkpoint of round "
                f"{self.round}"
            )
        self.shapes("shared"), self.shapes("server")

    def _open(self, name: str) -> h5py.File:
        """One of its files. Raises StoreError."""
        return hdf5.open_file(self.path / name, below=run_of(self.path))

    def attrs(self) -> dict[str, str | int | float]:
        """The attributes given to ``write_server``, the round among them."""
        with self._open("server.h5") as file:
            return schema.attributes(file)

    def shared(self) -> dict[str, np.ndarray]:
        """The shared leaves, in the order in which they were written."""
        return self._server_group("shared")

    def server(self) -> dict[str, np.ndarray]:
        """The server's own leaves, in the order in which they were written."""
        return self._server_group("server")

    def _server_group(self, group: str) -> dict[str, np.ndarray]:
        with self._open("server.h5") as file:
            return {
                unescape(name): hdf5.read(schema.table(file[group], name, 0))
                for name in schema.group_of(file, group)
            }

    def shapes(self, group: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of the leaves ``shared``, or those of the ``server``, by name. Raises
        StoreError.
        """
        with self._open("server.h5") as file:
            leaves = schema.group_of(file, group)
            tables = {unescape(name): schema.table(leaves, name, 0) for name in leaves}
            return {name: (dataset.shape, dataset.dtype) for name, dataset in tables.items()}

    def client_ids(self) -> list[int]:
        """The clients whose personal leaves are stored: 0 .. N - 1."""
        return list(range(self.manifest.clients))

    def leaf_names(self, client_ids: Sequence[int] = ()) -> list[str]:
        """The personal leaves that these clients (default: all) have in the same shape, in the
        order in which they were written. Raises StoreError for a client that is not stored.
        """
        return list(self._shapes(np.asarray(client_ids, np.int64)))

    def leaf_shapes(self, client_ids: Sequence[int]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape for one client and type of each of ``leaf_names``. Raises StoreError."""
        return self._shapes(np.asarray(client_ids, np.int64))

    @cached_property
    def _owned(self) -> dict[str, np.ndarray]:
        """Per shard the ids it holds, ascending: row r is client ids[r]."""
        names = [shard.name for shard in self.manifest.files if is_worker_file(shard.name)]
        owned = {}
        for name in names:
            with self._open(name) as file:
                ids = hdf5.read(schema.table(file, "client_id", 1, whole=True))
                if ids.ndim != 1 or (np.diff(ids) <= 0).any():
                    raise StoreError(
                        f"{self.path / name}: client_id is no list of ascending numbers"
                    )
                if len(ids):
                    owned[name] = ids.astype(np.int64)
        return owned

    @cached_property
    def _held(self) -> dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]]:
        """Per shard each leaf's shape for one client, and dtype."""
        held = {}
        for name, ids in self._owned.items():
            with self._open(name) as file:
                leaves = schema.group_of(file, "personal")
                tables = {leaf: schema.table(leaves, leaf, 1, len(ids)) for leaf in leaves}
                held[name] = {
                    unescape(leaf): (ds.shape[1:], ds.dtype) for leaf, ds in tables.items()
                }
        return held

    def _shapes(self, wanted: np.ndarray) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The leaves that all these clients have in the same shape."""
        if len(strange := wanted[(wanted < 0) | (wanted >= self.manifest.clients)]):
            raise StoreError(
                f"{self.path}: holds no client or leaf {strange.min()}; it is of another experiment"
            )

        def involved(ids):
            return not len(wanted) or np.isin(ids, wanted).any()

        held = [self._held[name].items() for name, ids in self._owned.items() if involved(ids)]
        return (
            {leaf: v for leaf, v in held[0] if all((leaf, v) in other for other in held)}
            if held
            else {}
        )

    def personal(
        self, client_ids: Sequence[int], leaves: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The personal leaves [len(client_ids), ...] of these clients, in this order; reads only
        their rows.

        By default the leaves that all of them have, in the same shape. Raises StoreError for a
        client or a leaf that is not stored.
        """
        wanted = np.asarray(client_ids, np.int64)
        shapes = self._shapes(wanted)
        leaves = list(shapes) if leaves is None else leaves
        if strange := sorted({*leaves} - {*shapes}):
            raise StoreError(
                f"{self.path}: holds no client or leaf {strange[0]!r}; it is of another experiment"
            )
        out = {leaf: np.empty((len(wanted), *shapes[leaf][0]), shapes[leaf][1]) for leaf in leaves}
        for name, ids in self._owned.items():
            places = np.flatnonzero(np.isin(wanted, ids))
            if not len(places):
                continue
            rows = np.searchsorted(ids, wanted[places])
            with self._open(name) as file:
                for leaf in leaves:
                    hdf5.read_rows(file["personal"][escape(leaf)], rows, out[leaf], places)
        return out

    def digest(self) -> dict[str, str]:
        """{"shared", "personal"}: SHA-256 over the leaves by name: name, dtype, shape, bytes.

        Personal leaves are [N, ...] in client order, so the shards do not matter; they are
        streamed. Clients whose leaves have other shapes come after each other, in the order of
        their first client.
        """
        shared, personal = sha256(), sha256()
        for leaf, value in sorted(self.shared().items()):
            shared.update(f"{leaf}\0{value.dtype.str}\0{value.shape}\0".encode() + value.tobytes())
        for ids, leaves in self._kinds():
            for leaf, (shape, dtype) in leaves:
                personal.update(f"{leaf}\0{dtype.str}\0{(len(ids), *shape)}\0".encode())
                block = max(1, 4 * hdf5.BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape)))
                for start in range(0, len(ids), block):
                    personal.update(
                        self.personal(ids[start : start + block], [leaf])[leaf].tobytes()
                    )
        return {"shared": shared.hexdigest(), "personal": personal.hexdigest()}

    def _kinds(self) -> list[tuple[list[int], tuple]]:
        """(clients, their leaves by name) for all clients with leaves of the same shapes."""
        kinds: dict[tuple, list[int]] = {}
        for name, ids in self._owned.items():
            kinds.setdefault(tuple(sorted(self._held[name].items())), []).extend(ids.tolist())
        return sorted(
            ((sorted(ids), leaves) for leaves, ids in kinds.items()), key=lambda kind: kind[0]
        )
