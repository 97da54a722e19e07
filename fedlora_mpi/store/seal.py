"""Checksums that show whether a log is as it was written.

HDF5 checks its chunks, but not the metadata about them.
"""

from collections.abc import Mapping
from hashlib import blake2b

import h5py
import numpy as np

from . import hdf5, schema
from .files import StoreError

HEAD_SEAL, ROW_SEALS = "seal", "row_seal"  # an attribute of the file; a data set [T] int64


def head_checksum(log: h5py.File) -> str:
    """Return the checksum of all but the rows: attributes, ``/versions`` and ``/partition``."""
    checksum = blake2b(digest_size=16)
    for name, group in {
        "": log,
        "versions": log["versions"],
        "partition": log["partition"],
    }.items():
        for key, value in sorted(schema.read_attributes(group).items()):
            if key != HEAD_SEAL:
                # the form that h5py returns; old seals were computed from it
                value = np.array(value, object) if isinstance(value, list) else value
                checksum.update(f"{name}@{key}={value}\0".encode())
    for name, dataset in sorted(log["partition"].items()):
        value = hdf5.read(dataset)
        checksum.update(f"{name}{value.dtype.str}{value.shape}\0".encode() + value.tobytes())
    return checksum.hexdigest()


def row_checksums(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return [T] int64: the checksum of each row of ``columns`` [T, ...] by name.

    Columns of ranks may begin late and become wider. So only the values of ranks that existed in
    that round are included.
    """
    prefixes = {
        name: f"{name}{value.dtype.str}".encode() for name, value in sorted(columns.items())
    }
    row_count = len(next(iter(columns.values()), ()))
    checksums = np.empty(row_count, np.int64)
    for row in range(row_count):
        checksum = blake2b(digest_size=8)
        for name, prefix in prefixes.items():
            value = columns[name][row]
            if name.startswith("ranks/"):
                known_ranks = np.flatnonzero((value != 0) & (value == value))  # NaN: no rank
                value = np.atleast_1d(value)[: known_ranks[-1] + 1 if len(known_ranks) else 0]
            if value.size:
                checksum.update(prefix + f"{value.shape}".encode() + value.tobytes())
        checksums[row] = int.from_bytes(checksum.digest(), "little", signed=True)
    return checksums


def verify(log: h5py.File, columns: Mapping[str, np.ndarray]) -> None:
    """Raise StoreError unless the log, whose rows are ``columns``, is as it was written.

    A log of an older version has no seals and is not checked.
    """
    if HEAD_SEAL not in log.attrs:
        return
    if schema.read_attribute(log, HEAD_SEAL) != head_checksum(log):
        raise StoreError("its checksum differs")
    first_column = next(iter(columns.values()), np.empty(0))
    damaged_rows = np.flatnonzero(
        hdf5.read(log[ROW_SEALS], len(first_column)) != row_checksums(columns)
    )
    if len(damaged_rows):
        raise StoreError(f"the checksum of row {damaged_rows[0]} differs")
