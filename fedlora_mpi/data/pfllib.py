"""Read a folder made by PFLlib: one file of training and one of test samples for each client.

The files are ``ROOT/train/<k>.npz`` and ``ROOT/test/<k>.npz``, k from 0, and ``ROOT/config.json``.
Each npz file has one array ``data`` that is a pickled dict {"x": images [n, ch, H, W], "y": classes
[n]}. A pickle may run any code, so the user has to allow it. Even then only numpy arrays, dicts,
lists and numbers are created from it. Files with plain arrays ``x`` and ``y`` hold no pickle.

Source: https://github.com/TsingZ0/PFLlib, dataset/utils/dataset_utils.py and the scripts beside it.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ..core.paths import expand_home

_ALLOWED_GLOBALS = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_ALLOWED_GLOBALS |= {("numpy", "ndarray"), ("numpy", "dtype")}
_DEFAULT_MOMENT = 0.5  # mean and standard deviation of every channel in PFLlib's Normalize
_NUMBERED = re.compile(r"(0|[1-9][0-9]*)\.npz")
_MAX_ROUNDING = 0.02  # largest accepted distance from a whole byte


class ClientSamples(NamedTuple):
    """The samples of all clients, in the order of the clients."""

    x: np.ndarray  # [M, ch, H, W] uint8
    y: np.ndarray  # [M] int64
    owner: np.ndarray  # [M] int64, the client of each sample


class FolderConfig(NamedTuple):
    """The entries of config.json that are used; None for a missing entry."""

    clients: int | None
    classes: int | None
    mean: tuple[float, ...] | None  # per channel
    std: tuple[float, ...] | None


class Folder(NamedTuple):
    """The content of a folder; its files hold (x / 255 - mean) / std of the bytes x."""

    train: ClientSamples
    test: ClientSamples
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hints: tuple[str, ...] = ()  # what the user should know, one line each


def read(root: str | Path, allow_pickle: bool) -> Folder:
    """Return the images of a folder as the bytes from which PFLlib made them.

    Raises ValueError if the folder does not exist, if files are missing or left over, if a pickle
    is not allowed or holds more than arrays, if the images do not come from bytes, or if the
    classes do not count from 0.
    """
    home = expand_home(root)
    config = _read_config(root, home / "config.json")
    clients = _count_clients(root, home, config.clients)
    files = {side: [home / side / f"{k}.npz" for k in range(clients)] for side in ("train", "test")}
    parts = {
        side: [_read_client(file, allow_pickle) for file in client_files]
        for side, client_files in files.items()
    }
    shapes = [x.shape[1:] for side in parts.values() for x, _ in side]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"root = {root}: images of {' and '.join(map(str, sorted(set(shapes))[:2]))}; they "
            "must be alike"
        )
    channels = shapes[0][0]
    mean, std = (moment or (_DEFAULT_MOMENT,) * channels for moment in (config.mean, config.std))
    if {len(mean), len(std)} != {channels}:
        raise ValueError(
            f"root = {root}: config.json has mean and std of {len(mean)} and {len(std)} channels, "
            f"the images have {channels}; correct config.json"
        )
    sides = [_join_clients(parts[name], files[name], mean, std) for name in ("train", "test")]
    classes, hints = _count_classes(
        root, np.concatenate([side.y for side in sides]), config.classes
    )
    return Folder(sides[0], sides[1], classes, mean, std, hints)


def _read_config(root: str | Path, file: Path) -> FolderConfig:
    """Return the entries of config.json, which may be missing; raise ValueError for a wrong one."""
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"root = {root}: {file} is no JSON ({error})") from error
    config = config if isinstance(config, dict) else {}
    counts = [config.get(name) for name in ("num_clients", "num_classes")]
    for name, value in zip(("num_clients", "num_classes"), counts, strict=True):
        if value is not None and (type(value) is not int or value < 1):
            problem = f"{file} has {name} = {json.dumps(value)}"
            raise ValueError(f"root = {root}: {problem}; it must be a whole number above 0")
    moments = [config.get(name) for name in ("mean", "std")]
    for name, value in zip(("mean", "std"), moments, strict=True):
        is_number_list = isinstance(value, list) and all(type(v) in (int, float) for v in value)
        if value is not None and not is_number_list:
            problem = f"{file} has {name} = {json.dumps(value)}"
            raise ValueError(f"root = {root}: {problem}; it must list a number per channel")
    return FolderConfig(*counts, *(value and tuple(map(float, value)) for value in moments))


def _count_clients(root: str | Path, home: Path, declared: int | None) -> int:
    """Return the number of clients.

    Raises ValueError unless train/ and test/ both have 0.npz, 1.npz and so on, as many as
    config.json says. Otherwise a client would be lost, or one of another partition would be used.
    """
    numbers_by_side, unnumbered = {}, []
    for side in ("train", "test"):
        names = [file.name for file in (home / side).glob("*.npz") if not file.name.startswith(".")]
        numbered = {name for name in names if _NUMBERED.fullmatch(name)}
        numbers_by_side[side] = sorted(int(name.removesuffix(".npz")) for name in numbered)
        unnumbered += sorted(f"{side}/{name}" for name in set(names) - numbered)
    file_count = max(
        (numbers[-1] + 1 for numbers in numbers_by_side.values() if numbers), default=0
    )
    client_count = declared or file_count
    needed = {*range(client_count or 1)}
    gaps = ((side, sorted(needed.difference(numbers_by_side[side]))) for side in numbers_by_side)
    missing = next((f"{side}/{numbers[0]}.npz" for side, numbers in gaps if numbers), None)
    if not missing and file_count == client_count and not unnumbered:
        return client_count
    findings = [
        f"{side}/ has {_format_ranges(numbers)}" for side, numbers in numbers_by_side.items()
    ]
    findings += [f"config.json says num_clients = {declared}"] if declared else []
    if unnumbered:
        verb = "is" if len(unnumbered) == 1 else "are"
        findings.append(f"{', '.join(unnumbered[:3])} {verb} not numbered as 0.npz, 1.npz ... are")
    if missing:
        raise ValueError(
            f"root = {root}: there is no {home / missing}; give a folder dataset/NAME of PFLlib, "
            f"with train/ and test/ ({'; '.join(findings)}); put back what is missing, or make the "
            "folder anew"
        )
    if file_count > client_count:
        raise ValueError(
            f"root = {root}: files {_format_ranges(range(client_count, file_count))} are left over "
            f"({'; '.join(findings)}); remove them from train/ and test/ if they are of an earlier "
            "partition, or correct config.json"
        )
    raise ValueError(f"root = {root}: {'; '.join(findings)}; rename or remove them")


def _format_ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges such as "0 to 2, 5", or "none"."""
    present = set(numbers)
    starts, ends = ([k for k in numbers if k + step not in present] for step in (-1, 1))
    runs = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    shown = [*runs[:5], "..."] if len(runs) > 5 else runs
    return ", ".join(shown) or "none"


def _count_classes(
    root: str | Path, y: np.ndarray, declared: int | None
) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes, and a hint if some have no sample.

    There is no hint if config.json declares the number. Raises ValueError if there is no sample, if
    labels seem to count from 1, or if they exceed the number ``declared`` in config.json.
    """
    seen = sorted(map(int, np.unique(y)))
    declaration = "" if declared is None else f", and config.json says num_classes = {declared}"
    if not seen:
        raise ValueError(f"root = {root}: holds no sample")
    if seen[0] > 0 and (declared is None or seen[-1] >= declared):
        raise ValueError(
            f"root = {root}: classes are {_format_ranges(seen)}{declaration}; classes count "
            "from 0: lower each y, or "
            f'say "num_classes": {seen[-1] + 1} in config.json if class 0 merely has no sample'
        )
    if declared is not None and seen[-1] >= declared:
        raise ValueError(
            f"root = {root}: classes are {_format_ranges(seen)}{declaration}; correct "
            f"config.json, or the classes beyond {declared - 1}"
        )
    classes = declared or seen[-1] + 1
    empty = [c for c in range(classes) if c not in set(seen)]
    if declared is None and empty:
        which = f"classes {_format_ranges(empty)} of {classes} have no sample"
        return classes, (f"data.root = {root}: {which}",)
    return classes, ()


def _read_client(file: Path, allow_pickle: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (x [n, ch, H, W], y [n]) of a file; raise ValueError if it cannot be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if {"x.npy", "y.npy"} <= set(names):
                x, y = (_read_array(archive.open(f"{name}.npy"), False) for name in "xy")
            elif "data.npy" in names:
                content = _read_array(archive.open("data.npy"), allow_pickle)
                record: Any = content.item() if content.shape == () else None
                x, y = (np.asarray(record[name]) for name in "xy")
            else:
                raise KeyError(f"it has {', '.join(names) or 'nothing'}, not data.npy")
    except _PickleNotAllowed:
        raise ValueError(
            f"allow_pickle = false: {file} is a pickle, as PFLlib writes it, and a pickle may run "
            "anything; set allow_pickle to true if you trust it (arrays and dicts alone are then "
            "read)"
        ) from None
    except Exception as error:  # a damaged or malicious pickle may raise anything
        why = " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(
            f"root = {file.parents[1]}: {file} holds no x and y that can be read ({why})"
        ) from error
    if (
        x.ndim != 4
        or x.shape[1] not in (1, 3)
        or y.shape != x.shape[:1]
        or not np.issubdtype(y.dtype, np.integer)
    ):
        shapes = f"x {list(x.shape)} of {x.dtype}, y {list(y.shape)} of {y.dtype}"
        raise ValueError(
            f"root = {file.parents[1]}: {file} has {shapes}; only images [n, 1 or 3, H, W] with "
            "classes [n] are read"
        )
    return x, y.astype(np.int64)


class _PickleNotAllowed(Exception):
    """Raised for a pickle that the user has not allowed."""


class _Unpickler(pickle.Unpickler):
    """Creates only numpy arrays and plain containers; raises an error for any other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; only numpy arrays and dicts are made"
            )
        return super().find_class(module, name)


def _read_array(file: IO[bytes], allow_pickle: bool) -> np.ndarray:
    """Return one array of an npz file; raise _PickleNotAllowed if it is a pickle."""
    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        if not allow_pickle:
            raise _PickleNotAllowed
        return _Unpickler(file).load()
    array = np.frombuffer(file.read(), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _join_clients(
    parts: list[tuple[np.ndarray, np.ndarray]], files: list[Path], mean: tuple, std: tuple
) -> ClientSamples:
    """Return the samples of all clients, in the order of the clients."""
    x = [_recover_bytes(x, mean, std, file) for (x, _), file in zip(parts, files, strict=True)]
    y = np.concatenate([y for _, y in parts])
    if len(y) and y.min() < 0:
        raise ValueError(
            f"root = {files[0].parents[1]}: a class is {y.min()}; classes count from 0"
        )
    return ClientSamples(
        np.concatenate(x), y, np.repeat(np.arange(len(parts)), [len(y) for _, y in parts])
    )


def _recover_bytes(x: np.ndarray, mean: tuple, std: tuple, file: Path) -> np.ndarray:
    """Return the bytes for which (byte / 255 - mean) / std is ``x``; the network then sees ``x``.

    Raises ValueError if there are no such bytes.
    """
    if x.dtype == np.uint8:
        return x
    shape = (1, -1, 1, 1)
    level = (x.astype(np.float64) * np.reshape(std, shape) + np.reshape(mean, shape)) * 255
    pixels = np.rint(level)
    if x.size and not (
        np.abs(level - pixels).max() < _MAX_ROUNDING and pixels.min() >= 0 and pixels.max() <= 255
    ):
        raise ValueError(
            f"root = {file.parents[1]}: x of {file} are no bytes normalised with mean "
            f"{mean[0]:g} and standard deviation {std[0]:g}; only such images are read "
            '(others: "mean" and "std" of each channel in config.json)'
        )
    return pixels.astype(np.uint8)
