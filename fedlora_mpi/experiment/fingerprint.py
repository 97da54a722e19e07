"""Digests of a run before round 1.

Ranks compare their digests, and a resume compares them with those in the run folder.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .. import config as configs
from ..aggregation.topology import MixingMatrix
from ..algorithm import Variables
from ..config import Config
from ..core.escapes import escape_line
from ..core.user_code import module_source
from ..data.datasets import Data
from ..data.partition import Split
from ..data.texts import Vocabulary
from ..models.network import Model
from ..models.quantized import QuantizedWeight
from ..models.state import attribute_digests
from ..models.weights import file_digest as of_files

KINDS = (
    "package",
    "settings",
    "data",
    "split",
    "topology",
    "structure",
    "constants",
    "attributes",
    "weights",
    "variables",
    "code",
    "platform",
)
# computed by arithmetic or a library, so the last bits may depend on the platform
PLATFORM_DEPENDENT = ("constants", "attributes", "weights", "variables")
# stored in a run folder
RECORDED_KINDS = (
    "data",
    "structure",
    "constants",
    "attributes",
    "weights",
    "variables",
    "platform",
)
Items = Mapping[str, str]  # name -> digest, or the value itself if it is short
Inventory = Mapping[str, Items]  # by kind
_BLOCK_BYTES = 2**24  # bytes


def build_inventory(
    config: Config,
    data: Data,
    models: Sequence[Model],
    split: Split,
    initial_variables: Sequence[Variables],
    beat: Callable[[], None],
    matrix: MixingMatrix | None = None,
) -> Inventory:
    """Return the digests of everything that must be the same on all ranks, and on a resume.

    initial_variables: those of each type of clients, all with the same shared ones; beat: called
    while bytes are read.
    """
    digest_by_id: dict[int, str] = {}  # a leaf of a network is often a variable too

    def digest(value: Tensor) -> str:
        if id(value) not in digest_by_id:
            digest_by_id[id(value)] = tensor_digest(value, beat)
        return digest_by_id[id(value)]

    networks = [
        (f"network {n}: " if len(models) > 1 else "", model) for n, model in enumerate(models)
    ]
    kinds = [
        (f"kind {n}: " if len(initial_variables) > 1 else "", initial)
        for n, initial in enumerate(initial_variables)
    ]
    leaves = [(prefix + n, v) for prefix, model in networks for n, v in model.initial.items()]
    constants = [(at + n, v) for at, model in networks for n, v in model.constants.items()]
    variables = [(f"shared {n}", v) for n, v in initial_variables[0].shared.items()]
    variables += [
        (f"{at}personal {n}", v) for at, first in kinds for n, v in first.personal.items()
    ]
    roles = {at + n: f" {leaf.role}" for at, model in networks for n, leaf in model.leaves.items()}
    return {
        "package": {"fedlora_mpi": __version__},
        "settings": {key: json.dumps(value) for key, value in configs.flatten(config).items()},
        "data": data_digests(data, digest),
        "split": {"who holds which samples": split.digest()},
        "topology": {"who exchanges with whom": matrix.digest()} if matrix else {},
        "structure": {
            n: _shape_and_dtype(v) + roles.get(n, "") for n, v in (*leaves, *constants, *variables)
        },
        "constants": {n: digest(v) for n, v in constants},
        "attributes": {
            at + n: v
            for at, model in networks
            for n, v in attribute_digests(model.modules[True]).items()
        },
        "weights": {n: digest(v) for n, v in leaves},
        "variables": {n: digest(v) for n, v in variables},
        "code": _code_digests(config),
        "platform": local_platform(),
    }


def run_digest(
    config: Config,
    split: Split,
    vocabulary: Vocabulary | None,
    matrix: MixingMatrix | None = None,
) -> str:
    """Return the digest that a checkpoint and a run that continues it must share.

    Its parts, joined by ``-``: the config, the split, the vocabulary, the mixing matrix, the weight
    files.
    """
    texts = [vocabulary.digest()] if vocabulary else []
    texts += [matrix.digest()] if matrix else []
    files = [of_files(*origin.files) for network in config.model.mix for origin in network.origins]
    return "-".join(
        [configs.digest(config), *(text[:16] for text in (split.digest(), *texts, *files))]
    )


def local_platform() -> Items:
    """Return what determines the last bits of a result on a CPU, besides the settings."""
    return {
        "CPU level": torch.backends.cpu.get_cpu_capability(),
        "CPU": _cpu_name(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def platform_dependent_kinds(config: Config) -> tuple[str, ...]:
    """Return the kinds whose bits may differ on another platform."""
    return (
        (*PLATFORM_DEPENDENT, "data")
        if config.data.source.dataset == "synthetic"
        else PLATFORM_DEPENDENT
    )


def recorded_inventory(inventory: Inventory) -> Inventory:
    """Return the part of the inventory that a run folder stores.

    The initial variables, possibly very many, share one digest.
    """
    return {kind: inventory[kind] for kind in RECORDED_KINDS} | {
        "variables": {"the first variables": f"{hash_items(inventory['variables']):x}"},
        **({"topology": inventory["topology"]} if inventory["topology"] else {}),
    }


def hash_items(items: Items) -> int:
    """Return 63 bits of a hash of names and digests, in their order."""
    text = json.dumps([*items.items()]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def describe_difference(
    kind: str, recorded: Items, current: Items, reference: str
) -> tuple[str, str]:
    """Return the first item in which ``current`` differs from ``recorded``, and a description.

    reference: where or when ``recorded`` was valid, in words.
    """
    prefix = {
        "weights": "initial weights of ",
        "variables": "before round 1: ",
        "constants": "constant ",
    }.get(kind, "")
    if sorted(recorded) != sorted(current):
        item = next(
            name for name in (*current, *recorded) if (name in current) != (name in recorded)
        )
        text = (
            f"is there, but not {reference}"
            if item in current
            else f"is not there, but {reference}"
        )
        return item, f"{prefix}{escape_line(item)} {text}"
    if list(recorded) != list(current):
        expected_item, item = next(
            (a, b) for a, b in zip(recorded, current, strict=False) if a != b
        )
        return (
            item,
            f"{prefix}{item} comes where {expected_item} does {reference}: registered in another "
            "order",
        )
    item = next(name for name in current if recorded[name] != current[name])
    if kind in ("package", "settings", "structure"):
        return item, f"{item} is {current[item]}, {reference} {escape_line(recorded[item])}"
    return item, f"{prefix}{item}: not the same as {reference}"


def describe_platforms(recorded: Items, current: Items, reference: str) -> str:
    """Return all differences between two platforms in words, "" if they are equal."""
    names = [name for name in current if recorded.get(name, current[name]) != current[name]]
    return ", ".join(
        f"{name} is {current[name]} ({escape_line(recorded[name])} {reference})" for name in names
    )


def tensor_digest(value: Tensor, beat: Callable[[], None] = lambda: None) -> str:
    """Return 16 hexadecimal digits: a hash of type, shape and bytes."""
    hasher = blake2b(_shape_and_dtype(value).encode(), digest_size=8)
    for part in value.parts if isinstance(value, QuantizedWeight) else (value,):
        rows = part.detach().reshape(1) if part.dim() == 0 else part.detach()
        block_rows = max(1, _BLOCK_BYTES // max(1, rows[:1].numel() * rows.element_size()))
        for start in range(0, len(rows), block_rows):
            hasher.update(tensor_bytes(rows[start : start + block_rows]))
            beat()
    return hasher.hexdigest()


def tensor_bytes(value: Tensor) -> memoryview:
    """Return the bytes of a tensor, row by row."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shape_and_dtype(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def data_digests(data: Data, digest: Callable[[Tensor], str] = tensor_digest) -> Items:
    """Return the digests of samples, labels, vocabulary, normalisation and clients of the samples.

    digest: of one tensor.
    """
    digests = {"classes": str(data.classes)}
    for name, side in (("training", data.train), ("test", data.test)):
        digests |= {f"{name} samples": digest(side.x), f"{name} labels": digest(side.y)}
    if data.vocabulary:
        digests["vocabulary"] = data.vocabulary.digest()
    if data.is_own:
        settings = json.dumps([data.mean, data.std, data.token_settings, data.class_names])
        digests["normalisation, token ids, class names"] = blake2b(
            settings.encode(), digest_size=8
        ).hexdigest()
    for name, owners in zip(("training", "test"), data.owners or (), strict=False):
        digests[f"clients of the {name} samples"] = tensor_digest(
            torch.from_numpy(np.asarray(owners))
        )
    return digests


def _code_digests(config: Config) -> dict[str, str]:
    """Return the digests of the user's modules that the config names."""
    names = [
        config.data.source.dataset,
        configs.algorithm_name(config.algorithm),
        config.model.loss,
        *(network.name for network in config.model.mix),
    ]
    modules = {
        name.partition(":")[0]
        for name in names
        if ":" in name and not name.startswith("torchvision:")
    }
    return {
        f"module {module}": blake2b(module_source(module)).hexdigest() for module in sorted(modules)
    }


def _cpu_name() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
