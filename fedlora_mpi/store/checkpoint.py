"""Checkpoints: ``RUN/checkpoints/000010/`` holds the state after round 10.

A checkpoint consists of shards (files), which any number of ranks can read.

Order of writing: rank 0 calls ``begin``; every worker calls ``write_clients``; rank 0 calls
``write_server`` and ``copy_log``. When all have returned, rank 0 calls ``commit``. Before that, the
folder is no checkpoint and nothing reads it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import h5py
import numpy as np

from ..core.disk_errors import explain_write_errors
from . import hdf5, manifest, nolinks
from .files import StoreError, copy_atomic
from .hdf5 import escape
from .manifest import (
    Manifest,
    Shard,
    is_checkpoint_file,
    is_worker_file,
    run_folder_of,
    worker_file,
)
from .snapshot import Checkpoint, checkpoint_folder

Leaves = Mapping[str, np.ndarray]


def _round_folders(run: Path) -> dict[int, Path]:
    """Return the folder of every round, committed or not, in the order of rounds.

    Raises StoreError when a link is in the way.
    """
    checkpoints = Path(run) / "checkpoints"
    try:
        with nolinks.open_folder(checkpoints, Path(run)) as handle:
            names = [
                name
                for name in os.listdir(handle)
                if re.fullmatch(r"\d{6}|[1-9]\d{6,17}", name, re.ASCII)
            ]
    except FileNotFoundError:
        return {}
    except OSError as why:
        raise StoreError(
            str(why) if isinstance(why, nolinks.WrongFileType) else f"{checkpoints}: {why.strerror}"
        ) from why
    return {round_: checkpoint_folder(run, round_) for round_ in sorted(map(int, names))}


def committed_rounds(run: Path) -> list[int]:
    """Return the rounds that have a committed checkpoint, valid or not, in ascending order."""
    return [
        round_
        for round_, folder in _round_folders(run).items()
        if (folder / manifest.NAME).is_file()
    ]


def begin(run: Path, round_: int) -> Path:
    """Return a new empty folder for the checkpoint of round ``round_``.

    An uncommitted folder of the same round is removed, or set aside if it contains other files than
    ours. A resume may have skipped damaged checkpoints of this round or of later ones: they are
    renamed to ``000010.aside``, so that ``prune`` does not keep them instead of good ones.

    Raises StoreError when this round has an intact committed checkpoint, and WriteError.
    """
    folder = checkpoint_folder(run, round_)
    for other_round in committed_rounds(run):
        path = checkpoint_folder(run, other_round)
        if other_round == round_ and _is_intact(path):
            raise StoreError(
                f"{path}: this round is committed already; resume from it, or move it away"
            )
        if other_round >= round_:
            _set_aside(path)
    with explain_write_errors(folder):
        if os.path.lexists(folder) and not nolinks.clear_folder(folder, is_checkpoint_file, run):
            _set_aside(folder)
        with nolinks.open_folder(folder, run, create=True):
            return folder


def _set_aside(folder: Path) -> None:
    """Rename ``folder`` to ``000010.aside``, or ``000010.aside-2``, ...

    An existing folder of that name is replaced if it contains only our files.
    """
    for number in count(1):
        aside = folder.with_name(f"{folder.name}.aside{f'-{number}' if number > 1 else ''}")
        with (
            explain_write_errors(aside),
            nolinks.open_folder(folder.parent, run_folder_of(folder)) as parent_handle,
        ):
            if not nolinks.exists(parent_handle, aside, "a folder") or nolinks.clear_folder(
                aside, is_checkpoint_file, run_folder_of(folder)
            ):
                os.rename(
                    folder.name, aside.name, src_dir_fd=parent_handle, dst_dir_fd=parent_handle
                )
                return


def write_clients(
    folder: Path, worker: int, client_ids: Sequence[int], personal: Leaves, client_type: int = 0
) -> Shard:
    """Write the clients of one type that one worker holds, and return the record of the file.

    personal: leaves [n, ...], whose rows are in the order of ``client_ids`` (any order).

    The rows are stored by ascending client id, 16 MiB at a time, so strided views cost no memory. A
    worker without clients writes a file with zero rows.
    """
    ids = np.asarray(client_ids, np.int64)
    assert len(np.unique(ids)) == len(ids), f"twice in one shard: {ids}"
    path, order = folder / worker_file(worker, client_type), np.argsort(ids)
    with hdf5.create_file(path, run_folder_of(folder)) as file:
        hdf5.write(file, "client_id", ids[order], ["client"])
        group = file.create_group("personal", track_order=True)
        for leaf, rows in personal.items():
            assert len(rows) == len(ids), f"{leaf}: {rows.shape} for {len(ids)} clients"
            hdf5.write(group, escape(leaf), rows, ["client"], order)
    return Shard.from_file(path)


def write_server(
    folder: Path,
    *,
    round_: int,
    shared: Leaves,
    server: Leaves,
    extra_attrs: Mapping[str, str | float] | None = None,
) -> Shard:
    """Write ``server.h5``: the shared leaves, the server's own leaves, and a few attributes."""
    path = folder / "server.h5"
    with hdf5.create_file(path, run_folder_of(folder)) as file:
        file.attrs.update({"round": round_, **(extra_attrs or {})})
        for name, leaves in {"shared": shared, "server": server}.items():
            group = file.create_group(name, track_order=True)
            for leaf, value in leaves.items():
                hdf5.write(group, escape(leaf), value)
    return Shard.from_file(path)


def copy_log(folder: Path, log_path: Path) -> Shard:
    """Copy the log of this round into the checkpoint.

    A resume restores this copy, so that no row is lost or occurs twice.
    """
    copy_atomic(log_path, folder / "log.h5", run_folder_of(folder))
    return Shard.from_file(folder / "log.h5")


def commit(folder: Path, shards: Sequence[Shard], *, run_digest: str, clients: int) -> None:
    """Make ``folder`` a checkpoint of ``clients`` clients, whose files are ``shards``."""
    for shard in shards:
        actual_size = (folder / shard.name).stat().st_size
        assert actual_size == shard.size, (
            f"{folder / shard.name}: {actual_size} bytes here, {shard.size} where it was written"
        )
    personal_shard = _write_personal_view(
        folder, [shard.name for shard in shards if is_worker_file(shard.name)], clients
    )
    Manifest(int(folder.name), run_digest, clients, (*shards, personal_shard)).write(folder)


def _write_personal_view(folder: Path, names: Sequence[str], clients: int) -> Shard:
    """Write ``personal.h5``: virtual datasets over the files of the workers.

    There is one dataset [N, ...] per leaf, in client order. If clients are of several types, the
    leaves of each type are in a group ``kind-0``, ``kind-1``, ... The groups are in the order of
    their first clients. Each holds leaves [n, ...] and the ``client_id`` [n] of their rows.
    """
    files_by_leaves: dict[tuple, dict[str, np.ndarray]] = {}  # leaves and shapes -> file -> ids
    for name in names:
        with hdf5.open_file(folder / name, root=run_folder_of(folder)) as file:
            if len(ids := file["client_id"][()]):
                spec = tuple(
                    (leaf, ds.shape[1:], ds.dtype) for leaf, ds in file["personal"].items()
                )
                files_by_leaves.setdefault(spec, {})[name] = ids
    files_by_leaves = dict(
        sorted(files_by_leaves.items(), key=lambda kind: _sorted_clients(kind[1])[0])
    )
    ids_by_type = [_sorted_clients(ids_by_file) for ids_by_file in files_by_leaves.values()]
    all_ids = np.sort(np.concatenate(ids_by_type)) if ids_by_type else np.arange(0)
    assert np.array_equal(all_ids, np.arange(clients)), (
        f"{folder}: not each of {clients} clients once: {all_ids}"
    )
    path = folder / "personal.h5"
    with hdf5.create_file(path, run_folder_of(folder)) as file:
        for number, ((spec, owned), ids) in enumerate(
            zip(files_by_leaves.items(), ids_by_type, strict=True)
        ):
            parent = file
            if len(files_by_leaves) > 1:
                parent = file.create_group(f"kind-{number}")
                hdf5.write(parent, "client_id", ids, ["client"])
            _create_virtual_datasets(
                parent.create_group("personal", track_order=True), spec, owned, ids
            )
        if not files_by_leaves:
            file.create_group("personal")
    return Shard.from_file(path)


def _sorted_clients(ids_by_file: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the clients of all these files, in ascending order."""
    return np.sort(np.concatenate(list(ids_by_file.values())))


def _create_virtual_datasets(
    group: h5py.Group, spec: tuple, ids_by_file: Mapping[str, np.ndarray], ids: np.ndarray
) -> None:
    """Fill ``group`` with virtual datasets [len(ids), ...] that map to the rows of the files."""
    for leaf, shape, dtype in spec:
        layout = h5py.VirtualLayout((len(ids), *shape), dtype)
        for name, source_ids in ids_by_file.items():
            source = h5py.VirtualSource(name, f"personal/{leaf}", (len(source_ids), *shape), dtype)
            layout[_as_slice(np.searchsorted(ids, source_ids))] = source
        # a reader sees this value if a shard is missing
        fill_value = np.nan if dtype.kind == "f" else None
        hdf5.label_axes(group.create_virtual_dataset(leaf, layout, fill_value), ["client"])


def _as_slice(ids: np.ndarray) -> slice | np.ndarray:
    """Return the ascending ``ids`` as a slice if they are evenly spaced, otherwise unchanged.

    A long list of indices makes HDF5 slow to open the file.
    """
    steps = np.unique(np.diff(ids))
    return slice(ids[0], ids[-1] + 1, steps[0] if len(steps) else 1) if len(steps) <= 1 else ids


def prune(run: Path, keep: int) -> None:
    """Remove the oldest committed checkpoints, so that ``keep`` remain.

    Uncommitted folders before the newest checkpoint are removed as well. The manifest is removed
    first and durably, so that a half-removed folder is no checkpoint. Files that are not ours stay.
    """
    assert keep >= 1, f"keep = {keep} would remove what a resume needs"
    kept_rounds = committed_rounds(run)[-keep:]
    for round_, folder in _round_folders(run).items():
        if kept_rounds and round_ < kept_rounds[-1] and round_ not in kept_rounds:
            with explain_write_errors(folder):
                nolinks.clear_folder(folder, is_checkpoint_file, run, first_name=manifest.NAME)


def newest_valid(run: Path, *, run_digest: str | None = None) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that is intact and belongs to this config.

    The second value has one line for each newer checkpoint that was skipped. Raises StoreError with
    all these lines when there is no valid checkpoint.
    """
    skipped: list[str] = []
    for round_ in reversed(committed_rounds(run)):
        try:
            snapshot = Checkpoint.read(checkpoint_folder(run, round_))
            snapshot.verify(run_digest)
            return snapshot, skipped
        except StoreError as why:
            skipped.append(str(why))
    reasons = "; ".join(skipped) or "none was committed"
    raise StoreError(
        f"{Path(run) / 'checkpoints'}: no valid checkpoint ({reasons}); start anew with another "
        "output"
    )


def _is_intact(folder: Path) -> bool:
    """Return whether the committed ``folder`` is an intact checkpoint, of whatever config."""
    try:
        Checkpoint.read(folder).verify()
    except StoreError:
        return False
    return True
