"""Checks of the files of a run folder, made before memory of the claimed size is allocated.

Every check raises StoreError, or an error that ``explain_read_errors`` turns into one. Its message
is one line with the file and the item.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core.escapes import summarize_error
from .files import StoreError

# bytes that a file may claim without holding them: HDF5 fills in what is not written yet
_CLAIM_SLACK = 1 << 20
_MAX_CLAIM_RATIO = 16  # claimed bytes per byte of the file
_DTYPES = {
    np.dtype(name)
    for name in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
_MAX_JSON_DEPTH = 50  # levels of nested blocks
_MAX_LIST_LENGTH = 10_000  # items of an attribute that is a list
MAX_INTEGER = 2**53  # the largest integer that is accepted
_TYPE_NAMES = {dict: "a block", str: "text", int: "an integer", list: "a list"}
# The config keys that an analysis needs. Optional keys are checked only if they are present.
_REQUIRED_SETTINGS = {
    "seed": int,
    "rounds": int,
    "algorithm": dict,
    "algorithm.name": str,
    "data": dict,
    "data.partition": dict,
    "data.partition.seed": int,
}
_OPTIONAL_SETTINGS = {
    "data.dataset": str,
    "data.partition.kind": str,
    "data.partition.clients": int,
    "evaluate": dict,
    "evaluate.every": int,
}


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn any error of reading a damaged file into a StoreError about ``path``."""
    try:
        yield
    except StoreError as why:
        raise StoreError(str(why) if str(path) in str(why) else f"{path}: {why}") from why
    except KeyError as why:
        raise StoreError(f"{path}: damaged, it has no {why}") from why
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ) as why:
        raise StoreError(f"{path}: missing or damaged ({summarize_error(why)})") from why


# --- HDF5


def check_file(path: Path, file: h5py.File) -> None:
    """Raise StoreError unless the file contains all its data, in plain types.

    It must not refer to another file in any of HDF5's ways, must not contain a type that no file of
    ours has, and its data sets together must not claim far more bytes than the file holds.
    """
    pending, items = [(file, 0)], []
    while pending:
        group, depth = pending.pop()
        if depth > 3:  # a group of a damaged file may contain itself
            raise StoreError(f"{path}: {group.name}: is deeper than any file of a run")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise StoreError(
                    f"{path}: {group.name}: {name} is a link; a file of a run may not point "
                    "elsewhere"
                )
            item = group[name]
            if isinstance(item, h5py.Group):
                pending.append((item, depth + 1))
            else:
                items.append(item)
    claimed = sum(_claimed_bytes(path, item) for item in items)
    if claimed > _CLAIM_SLACK + _MAX_CLAIM_RATIO * os.path.getsize(path):
        raise StoreError(
            f"{path}: its data sets claim {claimed:,} bytes, which is more than the file holds"
        )


def _claimed_bytes(path: Path, item: h5py.Dataset | h5py.Datatype) -> int:
    """Return the bytes that a data set of plain numbers claims. Raises StoreError."""
    if not isinstance(item, h5py.Dataset):
        raise StoreError(f"{path}: {item.name} is no data set")
    if item.external or item.is_virtual:
        raise StoreError(
            f"{path}: {item.name} is in another file; a file of a run may not point elsewhere"
        )
    try:
        dtype = item.dtype
    except TypeError as why:
        raise StoreError(
            f"{path}: {item.name} is of a type that no file of a run has ({summarize_error(why)})"
        ) from why
    enum = dtype.kind != "b" and h5py.check_enum_dtype(dtype)
    if dtype not in _DTYPES or enum or item.shape is None:
        raise StoreError(
            f"{path}: {item.name} is of type {str(dtype)[:100]}; a file of a run has plain "
            "numbers only"
        )
    size = math.prod(item.shape) * dtype.itemsize
    if size > _CLAIM_SLACK + _MAX_CLAIM_RATIO * item.id.get_storage_size():
        raise StoreError(
            f"{path}: {item.name} claims {item.shape}, which is more than the file holds"
        )
    return size


def read_attributes(owner: h5py.Group) -> dict[str, Any]:
    """Return the attributes of ``owner``: texts, numbers and lists of texts.

    Raises StoreError when there is any other.
    """
    return {name: read_attribute(owner, name) for name in owner.attrs}


def read_attribute(owner: h5py.Group, name: str, default: Any = None) -> Any:
    """Return an attribute, or ``default`` if it does not exist.

    Raises StoreError unless it is a text, a number or a list of texts.
    """
    if name not in owner.attrs:
        return default
    try:
        attribute_id = owner.attrs.get_id(name)
        is_text = h5py.check_string_dtype(attribute_id.dtype) is not None
        is_scalar = attribute_id.shape == () and (is_text or attribute_id.dtype in _DTYPES)
        value = (
            owner.attrs[name]
            if is_scalar
            or (
                is_text
                and len(attribute_id.shape) == 1
                and attribute_id.shape[0] <= _MAX_LIST_LENGTH
            )
            else None
        )
        value = (
            value.item()
            if isinstance(value, np.generic)
            else value.tolist()
            if isinstance(value, np.ndarray)
            else value
        )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                item.encode()
    except (TypeError, ValueError, OSError, RuntimeError, MemoryError) as why:
        raise StoreError(f"attribute {name!r} cannot be read ({summarize_error(why)})") from why
    if (
        not isinstance(value, str | int | float | list)
        or isinstance(value, list)
        and not all(isinstance(v, str) for v in value)
    ):
        raise StoreError(
            f"attribute {name!r} is of type {str(attribute_id.dtype)[:100]} {attribute_id.shape}, "
            "and no file of a run has such"
        )
    return value


def find_group(file: h5py.Group, name: str) -> h5py.Group:
    """Return a group of a file. Raises StoreError."""
    if not isinstance(group := file.get(name), h5py.Group):
        raise StoreError(f"{file.file.filename}: has no group {name!r}")
    return group


def find_dataset(
    file: h5py.Group, name: str, axes: int, rows: int | None = None, integers: bool = False
) -> h5py.Dataset:
    """Return a data set with at least ``axes`` axes and, if given, ``rows`` rows.

    integers: whether it must contain integers. Raises StoreError.
    """
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim < axes:
        raise StoreError(f"{file.file.filename}: has no data set {name!r} with {axes} axes")
    if integers and dataset.dtype.kind not in "iu":
        raise StoreError(
            f"{file.file.filename}: {dataset.name} is of type {dataset.dtype}, must be of integers"
        )
    if rows is not None and len(dataset) != rows:
        raise StoreError(
            f"{file.file.filename}: {dataset.name} has {len(dataset)} rows, there must be {rows}"
        )
    return dataset


def check_columns(columns: Mapping[str, Mapping[str, h5py.Dataset]], clients: int | None) -> None:
    """Raise StoreError unless the columns of a log have the required axes.

    Their numbers of rows are not checked: they may differ by one while a row is written.
    """
    for group, datasets in columns.items():
        for name, column in datasets.items():
            axes = 1 if group == "rounds" or (group, name) == ("ranks", "ranks") else 2
            if not isinstance(column, h5py.Dataset) or column.ndim != axes:
                raise StoreError(f"{group}/{name} is no data set of {axes} axes")
            if group == "clients" and clients is not None and column.shape[1] != clients:
                raise StoreError(
                    f"{group}/{name} is of {column.shape[1]} clients, the log of {clients}"
                )
    for group, name in (("rounds", "round"), ("ranks", "ranks")):
        if columns[group] and (
            name not in columns[group] or columns[group][name].dtype.kind not in "iu"
        ):
            raise StoreError(f"{group}/{name} is missing or not of integers")


def check_partition(arrays: Mapping[str, Any]) -> None:
    """Raise StoreError unless the arrays of ``/partition`` are consistent."""
    for name, value in arrays.items():
        if isinstance(value, np.ndarray):
            axes = 2 if name.endswith("_counts") else 1
            if (
                value.ndim != axes
                or value.dtype.kind not in "iu"
                or (value.size and value.min() < 0)
            ):
                raise StoreError(
                    f"partition/{name} must be of {axes} axes and of integers from 0 on"
                )
    clients = {len(value) for name, value in arrays.items() if name.endswith("_counts")}
    for name in [name.removesuffix("_offsets") for name in arrays if name.endswith("_offsets")]:
        offsets, indices = arrays[f"{name}_offsets"], arrays[f"{name}_indices"]
        if (
            not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != len(indices)
            or (np.diff(offsets) < 0).any()
        ):
            raise StoreError(f"partition/{name}_offsets do not divide partition/{name}_indices")
        clients.add(len(offsets) - 1)
    if len(clients) > 1:
        raise StoreError(f"partition is of {' and of '.join(map(str, sorted(clients)))} clients")


# --- JSON


def parse_json_block(text: str | bytes, description: str) -> dict[str, Any]:
    """Return the block that a JSON text contains. Raises StoreError."""
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicates)
    except (ValueError, TypeError, RecursionError) as why:
        raise StoreError(
            f"missing or damaged, {description} is no JSON of ours ({summarize_error(why)})"
        ) from why
    if not isinstance(value, dict):
        raise StoreError(f"{description} must be a block of keys, is {type(value).__name__}")
    pending: list[tuple[dict | list, int]] = [(value, 0)]
    while pending:
        block, depth = pending.pop()
        if depth > _MAX_JSON_DEPTH:
            raise StoreError(f"{description} is nested more than {_MAX_JSON_DEPTH} deep")
        pending += [
            (v, depth + 1)
            for v in (block.values() if isinstance(block, dict) else block)
            if isinstance(v, dict | list)
        ]
    return value


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    block = dict(pairs)
    if len(block) != len(pairs):
        raise ValueError("a key is given twice")
    return block


def checked_item(
    block: Mapping[str, Any],
    key: str,
    expected_type: type,
    least: int | None = None,
    most: int = MAX_INTEGER,
) -> Any:
    """Return ``block[key]``.

    Raises StoreError unless it is of this type and, if ``least`` is given, from ``least`` to
    ``most``.
    """
    value = block.get(key)
    if type(value) is not expected_type:
        raise StoreError(
            f"{key} must be {_TYPE_NAMES[expected_type]}, is "
            f"{'missing' if key not in block else repr(value)[:80]}"
        )
    if least is not None and not least <= block[key] <= most:
        raise StoreError(f"{key} = {repr(value)[:80]}: must be from {least} to {most}")
    return value


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise StoreError unless the config has the keys that an analysis needs."""
    for key, kind in (_REQUIRED_SETTINGS | _OPTIONAL_SETTINGS).items():
        *parents, name = key.split(".")
        block = config
        for parent in parents:
            block = block.get(parent, {})
        if key in _OPTIONAL_SETTINGS and name not in block:
            continue
        try:
            checked_item(
                block,
                name,
                kind,
                **({"least": int(key in _OPTIONAL_SETTINGS)} if kind is int else {}),
            )
        except StoreError as why:
            raise StoreError(f"config: {'.'.join([*parents, ''])}{why}") from why
