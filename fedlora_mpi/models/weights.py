"""Read weights from a file and use them as the initial weights of a network."""

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

from ..core.extras import extra_imports
from ..core.paths import expand_home
from ..core.tree import Tree
from ..core.vision import import_torchvision
from .network import Model

SUFFIXES = (".safetensors", ".pt", ".pth")


class WeightsFile(NamedTuple):
    """The path of a weights file, and torchvision's URL for it; "" for a user's own file."""

    path: Path
    url: str = ""


def find_file(network: str, source: str) -> WeightsFile:
    """Return the file, existing or not, that ``weights: source`` with ``name: network`` means.

    ``source`` is a path, relative to the working folder. For ``torchvision:<model>`` it may also be
    the name of one of the model's weights; these are in torch's cache. Raises ValueError if it is
    neither.
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


def read(
    path: Path, url: str = "", keep_double: bool = False, dtype: torch.dtype = torch.float32
) -> Tree:
    """Return the leaves of a file as ``dtype``.

    It is a safetensors file or a state dict saved by torch, by itself or under "state_dict" or
    "model". Leaves that are not floating-point, such as counts of batches, are left out.
    ``keep_double``: float64 stays float64. url: the SHA-256 of the file must begin with the digits
    in the name of ``url``. Nothing is downloaded, and nothing in a file is executed. Raises
    ValueError if the file is missing or damaged, or if it holds anything but finite numbers.
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
            kept = value.dtype if keep_double and value.dtype == torch.float64 else dtype
            tree[name] = value.detach().to(kept, copy=True, memory_format=torch.contiguous_format)
            if not tree[name].isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite")
    return tree


def load_weights(model: Model, tree: Tree) -> Model:
    """Return the same network with the leaves of ``tree`` as initial values.

    Frozen leaves are included. Each leaf keeps the dtype that it has in the network. The head keeps
    its values unless ``tree`` has all its leaves in the same shapes (it may have other classes). So
    does a buffer that is neither in the state dict nor in ``tree``. Raises ValueError for the first
    leaf that does not fit.
    """
    saved = model.modules[False].state_dict().keys()  # with all names of tied leaves
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
    skipped = () if all(map(has_same_shape, head)) else head
    return replace_values(
        model, {n: tree[n] for n in network_shapes if n in tree and n not in skipped}
    )


def replace_values(model: Model, tree: Tree) -> Model:
    """Return the same network with the leaves of ``tree``, frozen ones included, as initial values.

    Each leaf keeps the dtype that it has in the network. Raises ValueError if it overflows there.
    """
    present = model.all_values
    values = {n: v.to(present[n].dtype) for n, v in tree.items()}
    for name, value in values.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite as {value.dtype}")
    return replace(
        model,
        initial=model.initial | {n: values[n] for n in model.leaves if n in values},
        constants=model.constants | {n: values[n] for n in model.frozen_leaves if n in values},
    )


def _resolve_ties(model: Model, tree: Tree) -> Tree:
    """Return ``tree`` with tied leaves under their first name; raise ValueError if they differ."""
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
    """Return these leaves as a .safetensors file; raise ValueError if the library is missing."""

    # a copy: a view could share its memory with other leaves
    def to_contiguous(v):
        return v.detach().cpu().clone(memory_format=torch.contiguous_format)

    return _import_safetensors().torch.save(
        {n: to_contiguous(v) for n, v in tree.items()}, {"format": "pt"}
    )


def file_digest(*paths: Path) -> str:
    """Return the SHA-256 of the concatenated files in hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def _expected_digest(url: str) -> str:
    """Return the first digits of the SHA-256, which torch.hub reads from the name of a file."""
    match = re.search(r"-([a-f0-9]*)\.", posixpath.basename(url))
    assert match is not None, url
    return match[1]


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    """Return the tensors of a .safetensors file.

    The file is read completely, because a memory-mapped file could change during a run.
    """
    library = _import_safetensors()
    unpack = library.torch.load  # safetensors' function, not torch's: nothing is unpickled
    try:
        return unpack(path.read_bytes())
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error})") from error


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    """Return the state dict of a .pt or .pth file; raise ValueError if it holds none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle may raise anything. torch's own message advises to trust the file.
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
    """Import safetensors with its part for torch; raise ValueError if it is not installed."""
    with extra_imports("safetensors", "weights"):
        import safetensors
        import safetensors.torch
    return safetensors
