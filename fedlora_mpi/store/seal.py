"""What tells a log that is as it was written from a damaged one: HDF5 checks its chunks, not what
it says of them.
"""

from collections.abc import Mapping
from hashlib import blake2b

import h5py
import numpy as np

from . import hdf5, schema
from .files import StoreError

HEAD, ROWS = "seal", "row_seal"  # an attribute of the file; a data set [T] int64


def head(log: h5py.File) -> str:
    """The checksum of all that is no row: the attributes of the file, ``/versions`` and
    ``/partition``.
    """
    checksum = blake2b(digest_size=16)
    for name, group in {
        "": log,
        "versions": log["versions"],
        "partition": log["partition"],
    }.items():
        for key, value in sorted(schema.attributes(group).items()):
            if key != HEAD:
                # as h5py gives it, and old seals have it
                value = np.array(value, object) if isinstance(value, list) else value
                checksum.update(f"{name}@{key}={value}\0".encode())
    for name, dataset in sorted(log["partition"].items()):
        value = hdf5.read(dataset)
        checksum.update(f"{name}{value.dtype.str}{value.shape}\0".encode() + value.tobytes())
    return checksum.hexdigest()


def rows(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """[T] int64: the checksum of each row of ``columns`` [T, ...] by name; of ranks, whose columns
    may begin late and become wider, that of the ranks there were.
    """
    about = {name: f"{name}{value.dtype.str}".encode() for name, value in sorted(columns.items())}
    number = len(next(iter(columns.values()), ()))
    found = np.empty(number, np.int64)
    for row in range(number):
        checksum = blake2b(digest_size=8)
        for name, said in about.items():
            value = columns[name][row]
            if name.startswith("ranks/"):
                there = np.flatnonzero((value != 0) & (value == value))  # nan is none
                value = np.atleast_1d(value)[: there[-1] + 1 if len(there) else 0]
            if value.size:
                checksum.update(said + f"{value.shape}".encode() + value.tobytes())
        found[row] = int.from_bytes(checksum.digest(), "little", signed=True)
    return found


def verify(log: h5py.File, columns: Mapping[str, np.ndarray]) -> None:
    """Raise StoreError unless the log, whose rows are ``columns``, is as it was written; an old one
    has no seals.
    """
    if HEAD not in log.attrs:
        return
    if schema.attribute(log, HEAD) != head(log):
        raise StoreError("its checksum differs")
    first = next(iter(columns.values()), np.empty(0))
    wrong = np.flatnonzero(hdf5.read(log[ROWS], len(first)) != rows(columns))
    if len(wrong):
        raise StoreError(f"the checksum of row {wrong[0]} differs")
