"""Weights from a file in the place of a network's initial ones."""

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

from ..core.paths import expanded
from ..core.tree import Tree
from ..core.vision import torchvision
from .network import Model

FILES = (".safetensors", ".pt", ".pth")


class File(NamedTuple):
    """Where weights are, and where torchvision has them from; "" for a file of one's own."""

    path: Path
    url: str = ""


def find(network: str, given: str) -> File:
    """The file, there or not, that ``weights: given`` means beside ``name: network``.

    A path, relative to the working folder; for ``torchvision:<model>`` also the name of one of its
    weights, which are in torch's cache. Raises ValueError when it is neither.
    """
    if Path(given).suffix.lower() in FILES:
        return File(expanded(given))
    home, _, model = network.partition(":")
    known = (
        torchvision().models.get_model_weights(model).__members__ if home == "torchvision" else {}
    )
    if given not in known:
        names = f", or of {network} {', '.join(known) or 'none'}" if home == "torchvision" else ""
        raise ValueError(f"must be a file {', '.join(FILES)}{names}")
    url = known[given].url
    return File(Path(torch.hub.get_dir(), "checkpoints", posixpath.basename(url)), url)


def read(path: Path, url: str = "", fine: bool = False) -> Tree:
    """The leaves of a file as float32: of safetensors, or of a state dict as torch has saved it, by
    itself or under "state_dict" or "model". What is no floating-point number, such as a count of
    batches, is left out. ``fine``: those of float64 stay that.

    url: the SHA-256 of the file must begin as the name there says. Nothing is downloaded, and
    nothing in a file is executed. Raises ValueError when it is not there, damaged, or holds
    anything but finite numbers.
    """
    if not path.is_file():
        way_out = (
            f"; nothing is downloaded, put {url} there yourself (TORCH_HOME moves the folder)"
            if url
            else ""
        )
        raise ValueError(f"there is no file {path.absolute()}{way_out}")
    if url and not digest(path).startswith(_promised(url)):
        raise ValueError(
            f"{path} is damaged, its SHA-256 does not begin with {_promised(url)}; put {url} "
            "there anew"
        )
    tensors = _unpacked(path) if path.suffix.lower() == ".safetensors" else _unpickled(path)
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
            dtype = value.dtype if fine and value.dtype == torch.float64 else torch.float32
            tree[name] = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            if not tree[name].isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite")
    return tree


def load(model: Model, tree: Tree) -> Model:
    """The same network with the leaves of ``tree`` for its initial values, frozen ones included,
    each in its own dtype.

    A head that is not there as a whole, in its shapes (other classes), keeps its own. So does a
    buffer that is no part of a state dict. Raises ValueError for the first leaf that does not fit.
    """
    saved = model.modules[False].state_dict().keys()  # also the further names of what bears several
    leaves, tree = model.described, _named(model, tree)
    head = [n for n, leaf in leaves.items() if leaf.role == "head"]
    here = {n: list(leaf.shape) for n, leaf in leaves.items() if n in saved or n in tree}
    there = {n: list(value.shape) for n, value in tree.items() if n in leaves or n not in saved}

    def same(n):
        return here.get(n) == there.get(n)

    for name in here | there:
        if not same(name) and name not in head:
            raise ValueError(
                f"{name} is {there.get(name, 'absent')} in the file, {here.get(name, 'absent')} "
                "in the network; only the head may differ"
            )
    kept, values = () if all(map(same, head)) else head, model.values
    found = {n: tree[n].to(values[n].dtype) for n in here if n in tree and n not in kept}
    for name, value in found.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite as {value.dtype}")
    constants = model.constants | {n: v for n, v in found.items() if n in model.locked}
    return replace(
        model,
        initial=model.initial | {n: found[n] for n in model.leaves if n in found},
        constants=constants,
    )


def _named(model: Model, tree: Tree) -> Tree:
    """``tree`` with leaves that have several names under the first. Raises ValueError where they
    differ.
    """
    named = {n: v for n, v in tree.items() if n not in model.ties}
    for name, first in model.ties.items():
        if (
            name in tree
            and first in model.described
            and not torch.equal(named.setdefault(first, tree[name]), tree[name])
        ):
            raise ValueError(
                f"{first} and {name} differ in the file, and are one and the same in the network"
            )
    return named


def packed(tree: Tree) -> bytes:
    """The content of a .safetensors file with these leaves. Raises ValueError without the library."""

    # not a view into something
    def whole(v):
        return v.detach().cpu().clone(memory_format=torch.contiguous_format)

    return _safetensors().torch.save({n: whole(v) for n, v in tree.items()}, {"format": "pt"})


def digest(*paths: Path) -> str:
    """SHA-256 of files, one after the other, in hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def _promised(url: str) -> str:
    """The first digits of the SHA-256, as torch.hub reads them from the name of a file."""
    return re.search(r"-([a-f0-9]*)\.", posixpath.basename(url))[1]


def _unpacked(path: Path) -> Mapping[str, Any]:
    """The tensors of a .safetensors file, its bytes read at once: a mapped file may change while a
    run goes on.
    """
    library = _safetensors()
    unpack = library.torch.load  # of safetensors, not torch's own: nothing is unpickled
    try:
        return unpack(path.read_bytes())
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error})") from error


def _unpickled(path: Path) -> Mapping[str, Any]:
    """The state dict of a .pt file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged pickle may raise anything; torch's own advice is to trust it
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}); save the "
            "state_dict() of the network"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path} holds no state dict but {type(found).__name__}; save the state_dict() of the "
            "network"
        )
    return found


def _safetensors() -> ModuleType:
    """The library, with the part for torch."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            "safetensors is not installed; pip install 'fedlora-mpi[weights]'"
        ) from error
    return safetensors
