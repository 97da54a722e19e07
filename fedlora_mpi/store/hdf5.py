"""Access to the HDF5 files of a run folder: versioned, checksummed, durable, with exact leaf names.

HDF5's own file locks are off: some cluster file systems refuse them, and they would prevent reading
the log of a running run. ``lock.py`` protects the folder instead.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import h5py
import numpy as np

from . import schema
from .disk import FallbackFile
from .files import FORMAT_VERSION, StoreError, check_format, open_for_reading, replace_file

CHUNK_BYTES = 64 << 10  # smaller chunks cost more in bookkeeping than in transfer
BLOCK_BYTES = 16 << 20  # most extra memory of one write or read


@contextmanager
def create_file(path: Path, root: Path | None = None) -> Iterator[h5py.File]:
    """Yield a new file, which appears as ``path`` if the block succeeds; see ``replace_file``."""
    with replace_file(path, root) as file, closing(FallbackFile(os.dup(file.fileno()))) as disk:
        with h5py.File(disk, "w", locking=False) as file:
            file.attrs["format_version"] = FORMAT_VERSION
            yield file
        disk.sync()


def open_file(path: Path, disk: FallbackFile | None = None, root: Path | None = None) -> h5py.File:
    """Open an existing file of ours for reading, or for writing if ``disk`` is given.

    Raises StoreError.
    """
    try:
        file = h5py.File(disk, "r+", locking=False) if disk else _open_read_only(path, root)
    except OSError as why:
        raise StoreError(f"{path}: missing or not HDF5 ({why})") from why
    try:
        with schema.explain_read_errors(path):
            check_format(path, schema.read_attribute(file, "format_version"))
            schema.check_file(path, file)
    except BaseException:
        file.close()
        raise
    return file


def _open_read_only(path: Path, root: Path | None) -> h5py.File:
    """Open the file for reading and check that no link was followed.

    HDF5 opens the file by its name, because that is its fastest way.
    """
    with open_for_reading(path, root) as checked_file:
        file = h5py.File(path, "r", locking=False)
        if not os.path.sameopenfile(checked_file.fileno(), file.id.get_vfd_handle()):
            file.close()
            raise StoreError(f"{path}: has just been replaced; try again")
    return file


def escape(leaf: str) -> str:
    """Return the HDF5 name of a leaf.

    ``~`` and ``/`` are escaped as in a JSON pointer. ``%`` is escaped too, because virtual data
    sets interpret it.
    """
    assert leaf not in ("", "."), f"{leaf!r} cannot name a leaf"
    return leaf.replace("~", "~0").replace("/", "~1").replace("%", "~2")


def unescape(name: str) -> str:
    """Return the leaf whose HDF5 name is ``name``."""
    return name.replace("~2", "%").replace("~1", "/").replace("~0", "~")


def write(
    group: h5py.Group,
    name: str,
    array: np.ndarray,
    axes: Sequence[str] = (),
    order: np.ndarray | None = None,
) -> h5py.Dataset:
    """Store ``array``, its rows in ``order``, and label its axes.

    The array may have any strides; it is written block by block. Scalars and empty arrays cannot be
    chunked, so they have no fletcher32 checksum; the checksum in the manifest covers them.
    """
    if array.ndim == 0 or array.size == 0:
        return label_axes(group.create_dataset(name, data=array), axes)
    row_bytes = array.itemsize * math.prod(array.shape[1:])
    chunk = min(len(array), -(-CHUNK_BYTES // row_bytes))
    # a multiple of the chunk, so that no chunk is written twice
    block = chunk * max(1, BLOCK_BYTES // (chunk * row_bytes))
    dataset = group.create_dataset(
        name, array.shape, array.dtype, chunks=(chunk, *array.shape[1:]), fletcher32=True
    )
    for start in range(0, len(array), block):
        rows = slice(start, start + block)
        dataset[rows] = array[rows if order is None else order[rows]]
    return label_axes(dataset, axes)


def label_axes(dataset: h5py.Dataset, axes: Sequence[str]) -> h5py.Dataset:
    """Name the leading axes of ``dataset`` and return it."""
    for dimension, axis in zip(dataset.dims, axes, strict=False):
        dimension.label = axis
    return dataset


def read(dataset: h5py.Dataset, rows: int | None = None) -> np.ndarray:
    """Return all rows of a data set, or the first ``rows``.

    Raises StoreError when the data set claims far more bytes than the file holds.
    """
    shape = dataset.shape if rows is None else (rows, *dataset.shape[1:])
    if math.prod(shape) * dataset.dtype.itemsize > (1 << 20) + 16 * dataset.id.get_storage_size():
        raise StoreError(f"{dataset.name} claims {shape}, which is more than the file holds")
    return np.asarray(dataset[()] if rows is None else dataset[:rows])


def read_rows(
    dataset: h5py.Dataset, rows: np.ndarray, out: np.ndarray, positions: np.ndarray
) -> None:
    """Assign ``out[positions] = dataset[rows]``.

    Rows that are close to each other are read in one slice of at most 16 MiB.
    """
    row_bytes = max(1, dataset.dtype.itemsize * math.prod(dataset.shape[1:]))
    max_gap = max(1, CHUNK_BYTES // row_bytes)  # reading a shorter gap is faster than skipping it
    limit = max(1, BLOCK_BYTES // row_bytes)
    order = np.argsort(rows, kind="stable")
    rows, positions = rows[order], positions[order]
    cuts = np.flatnonzero((np.diff(rows) > max_gap) | (np.diff(rows // limit) > 0)) + 1
    for run, run_positions in zip(np.split(rows, cuts), np.split(positions, cuts), strict=True):
        out[run_positions] = dataset[run[0] : run[-1] + 1][run - run[0]]
