"""A folder that PFLlib has made: one file of training and one of test samples for each client.

``ROOT/train/<k>.npz`` and ``ROOT/test/<k>.npz``, k from 0, each with one array ``data`` that is a pickled dict {"x":
images [n, ch, H, W], "y": classes [n]}; ``ROOT/config.json``. A pickle may run anything, so the user has to allow it, and
then only numpy arrays, dicts, lists and numbers are made of it. Files with plain arrays ``x`` and ``y`` hold no pickle.

Source: https://github.com/TsingZ0/PFLlib, dataset/utils/dataset_utils.py and the scripts beside it.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ..paths import expanded

_ARRAYS = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_ARRAYS |= {("numpy", "ndarray"), ("numpy", "dtype")}
_NORMAL = 0.5  # mean and standard deviation of PFLlib's Normalize, of every channel
_OFF = 0.02  # of a step from one byte to the next


class Side(NamedTuple):
    """The samples of all clients, one client after the other."""

    x: np.ndarray  # [M, ch, H, W] uint8
    y: np.ndarray  # [M] int64
    owner: np.ndarray  # [M] int64, the client


class Folder(NamedTuple):
    """What a folder holds; its files have (x / 255 - mean) / std."""

    train: Side
    test: Side
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read(root: str | Path, allow_pickle: bool) -> Folder:
    """The images of a folder as the bytes they were made from.

    Raises ValueError: no such folder, a pickle that is not allowed or holds more than arrays, no images of bytes.
    """
    home = expanded(root)
    clients = 0
    while (home / "train" / f"{clients}.npz").is_file():
        clients += 1
    missing = [k for k in range(clients) if not (home / "test" / f"{k}.npz").is_file()]
    if not clients or missing:
        file = home / ("test" if clients else "train") / f"{missing[0] if missing else 0}.npz"
        raise ValueError(f"root = {root}: there is no {file}; give a folder dataset/NAME of PFLlib, with train/ and test/")
    about = _about(home / "config.json")
    files = {side: [home / side / f"{k}.npz" for k in range(clients)] for side in ("train", "test")}
    parts = {side: [_client(file, allow_pickle) for file in these] for side, these in files.items()}
    shapes = [x.shape[1:] for side in parts.values() for x, _ in side]
    if len(set(shapes)) > 1:
        raise ValueError(f"root = {root}: images of {' and '.join(map(str, sorted(set(shapes))[:2]))}; they must be alike")
    mean, std = (tuple(map(float, about.get(name, [_NORMAL] * shapes[0][0]))) for name in ("mean", "std"))
    sides = [_side(parts[name], files[name], mean, std) for name in ("train", "test")]
    classes = max(int(side.y.max()) + 1 for side in sides if len(side.y))
    return Folder(*sides, max(classes, int(about.get("num_classes", 0))), mean, std)


def _about(file: Path) -> dict[str, Any]:
    """config.json, which may be missing."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"root = {file.parent}: {file} is no JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _client(file: Path, allow_pickle: bool) -> tuple[np.ndarray, np.ndarray]:
    """(x [n, ch, H, W], y [n]) of a file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if {"x.npy", "y.npy"} <= set(names):
                x, y = (_array(archive.open(f"{name}.npy"), False) for name in "xy")
            elif "data.npy" in names:
                found = _array(archive.open("data.npy"), allow_pickle)
                found = found.item() if found.shape == () else None
                x, y = (np.asarray(found[name]) for name in "xy")
            else:
                raise KeyError(f"it has {', '.join(names) or 'nothing'}, not data.npy")
    except _NotAllowed:
        raise ValueError(
            f"allow_pickle = false: {file} is a pickle, as PFLlib writes it, and a pickle may run anything; set "
            "allow_pickle to true if you trust it (arrays and dicts alone are then read)"
        ) from None
    except Exception as error:  # a damaged or evil pickle may raise anything
        why = " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(f"root = {file.parents[1]}: {file} holds no x and y that can be read ({why})") from error
    if x.ndim != 4 or x.shape[1] not in (1, 3) or y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        shapes = f"x {list(x.shape)} of {x.dtype}, y {list(y.shape)} of {y.dtype}"
        raise ValueError(f"root = {file.parents[1]}: {file} has {shapes}; only images [n, 1 or 3, H, W] with classes [n] are read")
    return x, y.astype(np.int64)


class _NotAllowed(Exception):
    """A pickle that the user has not allowed."""


class _Unpickler(pickle.Unpickler):
    """Makes numpy arrays and plain containers, and refuses the name of anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}; only numpy arrays and dicts are made")
        return super().find_class(module, name)


def _array(file: IO[bytes], allow_pickle: bool) -> np.ndarray:
    """One array of an npz file."""
    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        if not allow_pickle:
            raise _NotAllowed
        return _Unpickler(file).load()
    array = np.frombuffer(file.read(), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _side(parts: list[tuple[np.ndarray, np.ndarray]], files: list[Path], mean: tuple, std: tuple) -> Side:
    """All clients one after the other."""
    x = [_bytes(x, mean, std, file) for (x, _), file in zip(parts, files, strict=True)]
    y = np.concatenate([y for _, y in parts])
    if len(y) and y.min() < 0:
        raise ValueError(f"root = {files[0].parents[1]}: a class is {y.min()}; classes count from 0")
    return Side(np.concatenate(x), y, np.repeat(np.arange(len(parts)), [len(y) for _, y in parts]))


def _bytes(x: np.ndarray, mean: tuple, std: tuple, file: Path) -> np.ndarray:
    """The bytes that (byte / 255 - mean) / std makes these numbers of; the network is to see the same."""
    if x.dtype == np.uint8:
        return x
    shape = (1, -1, 1, 1)
    level = (x.astype(np.float64) * np.reshape(std, shape) + np.reshape(mean, shape)) * 255
    found = np.rint(level)
    if x.size and not (np.abs(level - found).max() < _OFF and found.min() >= 0 and found.max() <= 255):
        raise ValueError(
            f"root = {file.parents[1]}: x of {file} are no bytes normalised with mean {mean[0]:g} and standard deviation "
            f"{std[0]:g}; only such images are read (others: \"mean\" and \"std\" of each channel in config.json)"
        )
    return found.astype(np.uint8)
