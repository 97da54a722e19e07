"""Weights from a file that replace a network's initial ones."""

import hashlib
import posixpath
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.paths import expand_home
from ..core.tree import Tree
from ..core.vision import import_torchvision
from .network import Model

SUFFIXES = (".safetensors", ".pt", ".pth")


class WeightsFile(NamedTuple):
    """Where weights are, and where torchvision has them from; "" for a file of one's own."""

    path: Path
    url: str = ""


def find_file(network: str, source: str) -> WeightsFile:
    """The file, there or not, that ``weights: given`` means beside ``name: network``.

    A path, relative to the working folder; for ``torchvision:<model>`` also the name of one of its
    weights, which are in torch's cache. Raises ValueError when it is neither.
    """
    if Path(source).suffix.lower() in SUFFIXES:
        return WeightsFile(expand_home(source))
    library, _, model = network.partition(":")
    known_weights = (
        import_torchvision().models.get_model_weights(model).__members__
        if library == "torchvision"
        else {}
    )
    if source not in known_weights:
        names = (
            f", or of {network} {', '.join(known_weights) or 'none'}"
            if library == "torchvision"
            else ""
        )
        raise ValueError(f"must be a file {', '.join(SUFFIXES)}{names}")
    url = known_weights[source].url
    return WeightsFile(Path(torch.hub.get_dir(), "checkpoints", posixpath.basename(url)), url)


def read(path: Path, url: str = "", keep_double: bool = False) -> Tree:
    """The leaves of a file as float32. It is a safetensors file, or a state dict that torch has
    saved, by itself or under "state_dict" or "model". Leaves that are not floating-point, such as
    counts of batches, are left out. ``keep_double``: float64 stays float64.

    url: the SHA-256 of the file must begin as the name in ``url`` says. Nothing is downloaded, and
    nothing in a file is executed. Raises ValueError when the file is missing, damaged, or holds
    anything but finite numbers.
    """
    if not path.is_file():
        way_out = (
            f"; nothing is downloaded, put {url} there yourself (TORCH_HOME moves the folder)"
            if url
            else ""
        )
        raise ValueError(f"there is no file {path.absolute()}{way_out}")
    if url and not file_digest(path).startswith(_expected_digest(url)):
        raise ValueError(
            f"{path} is damaged, its SHA-256 does not begin with {_expected_digest(url)}; put "
            f"{url} there anew"
        )
    tensors = (
        _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_state_dict(path)
    )
    tree = {}
    for name, value in tensors.items():
        if (
            not isinstance(value, Tensor)
            or value.layout is not torch.strided
            or value.device.type != "cpu"
        ):
            raise ValueError(
                f"{name} is no dense tensor there; save the state_dict() of the network"
            )
        if value.is_floating_point():
            dtype = value.dtype if keep_double and value.dtype == torch.float64 else torch.float32
            tree[name] = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            if not tree[name].isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite")
    return tree


def load_weights(model: Model, tree: Tree) -> Model:
    """The same network with the leaves of ``tree`` as initial values, frozen ones included, each in
    the dtype that it has in the network.

    A head that is not in ``tree`` as a whole and in its shapes (other classes) keeps its values. So
    does a buffer outside the state dict. Raises ValueError for the first leaf that does not fit.
    """
    saved = model.modules[False].state_dict().keys()  # also the further names of what bears several
    leaves, tree = model.all_leaves, _resolve_ties(model, tree)
    head = [n for n, leaf in leaves.items() if leaf.role == "head"]
    network_shapes = {n: list(leaf.shape) for n, leaf in leaves.items() if n in saved or n in tree}
    file_shapes = {
        n: list(value.shape) for n, value in tree.items() if n in leaves or n not in saved
    }

    def has_same_shape(n):
        return network_shapes.get(n) == file_shapes.get(n)

    for name in network_shapes | file_shapes:
        if not has_same_shape(name) and name not in head:
            raise ValueError(
                f"{name} is {file_shapes.get(name, 'absent')} in the file, "
                f"{network_shapes.get(name, 'absent')} in the network; only the head may differ"
            )
    skipped, values = () if all(map(has_same_shape, head)) else head, model.all_values
    loaded = {
        n: tree[n].to(values[n].dtype) for n in network_shapes if n in tree and n not in skipped
    }
    for name, value in loaded.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite as {value.dtype}")
    constants = model.constants | {n: v for n, v in loaded.items() if n in model.frozen_leaves}
    return replace(
        model,
        initial=model.initial | {n: loaded[n] for n in model.leaves if n in loaded},
        constants=constants,
    )


def _resolve_ties(model: Model, tree: Tree) -> Tree:
    """``tree``, with tied leaves under their first name. Raises ValueError if they differ."""
    untied = {n: v for n, v in tree.items() if n not in model.ties}
    for name, first in model.ties.items():
        if (
            name in tree
            and first in model.all_leaves
            and not torch.equal(untied.setdefault(first, tree[name]), tree[name])
        ):
            raise ValueError(
                f"{first} and {name} differ in the file, and are one and the same in the network"
            )
    return untied


def pack_safetensors(tree: Tree) -> bytes:
    """A .safetensors file of these leaves. Raises ValueError if the library is missing."""

    # not a view into something
    def to_contiguous(v):
        return v.detach().cpu().clone(memory_format=torch.contiguous_format)

    return _import_safetensors().torch.save(
        {n: to_contiguous(v) for n, v in tree.items()}, {"format": "pt"}
    )


def file_digest(*paths: Path) -> str:
    """SHA-256 of files, one after the other, in hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def _expected_digest(url: str) -> str:
    """The first digits of the SHA-256, as torch.hub reads them from the name of a file."""
    match = re.search(r"-([a-f0-9]*)\.", posixpath.basename(url))
    assert match is not None, url
    return match[1]


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a .safetensors file, read at once: a mapped file could change during a run."""
    library = _import_safetensors()
    unpack = library.torch.load  # of safetensors, not torch's own: nothing is unpickled
    try:
        return unpack(path.read_bytes())
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error})") from error


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    """The state dict of a .pt file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged pickle may raise anything; torch's own advice is to trust it
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}); save the "
            "state_dict() of the network"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} holds no state dict but {type(state).__name__}; save the state_dict() of the "
            "network"
        )
    return state


def _import_safetensors() -> ModuleType:
    """The library, with the part for torch."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            "safetensors is not installed; pip install 'fedlora-mpi[weights]'"
        ) from error
    return safetensors
