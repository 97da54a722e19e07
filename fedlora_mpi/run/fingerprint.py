"""What a run is made of before round 1, in digests: for ranks to compare, and for a resume to
compare with the run folder.
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
from ..algorithm import Variables
from ..config import Config
from ..core.escapes import escape_line
from ..core.user_code import module_source
from ..data.datasets import Data
from ..data.partition import Split
from ..data.texts import Vocabulary
from ..models.network import Model
from ..models.state import attribute_digests
from ..models.weights import file_digest as of_files

KINDS = (
    "package",
    "settings",
    "data",
    "split",
    "structure",
    "constants",
    "attributes",
    "weights",
    "variables",
    "code",
    "platform",
)
# by arithmetic or a library, whose last bits and version are the platform's
COMPUTED = ("attributes", "weights", "variables")
# in a run folder
KEPT = ("data", "structure", "constants", "attributes", "weights", "variables", "platform")
Items = Mapping[str, str]  # name -> digest or, where that is short, the value
Inventory = Mapping[str, Items]  # by kind
_AT_ONCE = 2**24  # bytes


def inventory(
    config: Config,
    data: Data,
    models: Sequence[Model],
    split: Split,
    firsts: Sequence[Variables],
    beat: Callable[[], None],
) -> Inventory:
    """All that must be the same on all ranks, and on a resume.

    firsts: the variables of each kind of clients, all with the same shared ones; beat: is called
    while bytes are read.
    """
    known: dict[int, str] = {}  # a leaf of a network is often a variable too

    def digest(value: Tensor) -> str:
        if id(value) not in known:
            known[id(value)] = of_tensor(value, beat)
        return known[id(value)]

    networks = [
        (f"network {n}: " if len(models) > 1 else "", model) for n, model in enumerate(models)
    ]
    kinds = [(f"kind {n}: " if len(firsts) > 1 else "", first) for n, first in enumerate(firsts)]
    leaves = [(at + n, v) for at, model in networks for n, v in model.initial.items()]
    constants = [(at + n, v) for at, model in networks for n, v in model.constants.items()]
    variables = [(f"shared {n}", v) for n, v in firsts[0].shared.items()]
    variables += [
        (f"{at}personal {n}", v) for at, first in kinds for n, v in first.personal.items()
    ]
    roles = {at + n: f" {leaf.role}" for at, model in networks for n, leaf in model.leaves.items()}
    return {
        "package": {"fedlora_mpi": __version__},
        "settings": {key: json.dumps(value) for key, value in configs.flat(config).items()},
        "data": _of_data(data, digest),
        "split": {"who holds which samples": split.digest()},
        "structure": {n: _form(v) + roles.get(n, "") for n, v in (*leaves, *constants, *variables)},
        "constants": {n: digest(v) for n, v in constants},
        "attributes": {
            at + n: v
            for at, model in networks
            for n, v in attribute_digests(model.modules[True]).items()
        },
        "weights": {n: digest(v) for n, v in leaves},
        "variables": {n: digest(v) for n, v in variables},
        "code": _of_code(config),
        "platform": platform_here(),
    }


def run_digest(config: Config, split: Split, vocabulary: Vocabulary | None) -> str:
    """What a checkpoint must have in common with the run that goes on with it."""
    texts = [vocabulary.digest()] if vocabulary else []
    files = [of_files(*origin.files) for network in config.model.mix for origin in network.origins]
    return "-".join(
        [configs.digest(config), *(text[:16] for text in (split.digest(), *texts, *files))]
    )


def platform_here() -> Items:
    """What decides the last bits of a result on a CPU, beside the settings."""
    return {
        "CPU level": torch.backends.cpu.get_cpu_capability(),
        "CPU": _processor(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def computed(config: Config) -> tuple[str, ...]:
    """The kinds of which another platform may make other bits."""
    return (*COMPUTED, "data") if config.data.source.dataset == "synthetic" else COMPUTED


def kept(mine: Inventory) -> Inventory:
    """What a run folder keeps of it: of a method's own variables, which may be very many, one
    digest.
    """
    return {kind: mine[kind] for kind in KEPT} | {
        "variables": {"the first variables": f"{number(mine['variables']):x}"}
    }


def number(items: Items) -> int:
    """63 bits of names and digests, in their order."""
    text = json.dumps([*items.items()]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def difference(kind: str, was: Items, now: Items, base: str) -> tuple[str, str]:
    """The first item in which ``now`` is not as ``was``, and that in words; ``base``: where or when
    it was so.
    """
    before = {
        "weights": "initial weights of ",
        "variables": "before round 1: ",
        "constants": "constant ",
    }.get(kind, "")
    if sorted(was) != sorted(now):
        item = next(name for name in (*now, *was) if (name in now) != (name in was))
        text = f"is there, but not {base}" if item in now else f"is not there, but {base}"
        return item, f"{before}{escape_line(item)} {text}"
    if list(was) != list(now):
        first, item = next((a, b) for a, b in zip(was, now, strict=False) if a != b)
        return item, f"{before}{item} comes where {first} does {base}: registered in another order"
    item = next(name for name in now if was[name] != now[name])
    if kind in ("package", "settings", "structure"):
        return item, f"{item} is {now[item]}, {base} {escape_line(was[item])}"
    return item, f"{before}{item}: not the same as {base}"


def unlike(was: Items, now: Items, base: str) -> str:
    """All that differs between two platforms, in words; nothing when they are alike."""
    names = [name for name in now if was.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} is {now[name]} ({escape_line(was[name])} {base})" for name in names)


def of_tensor(value: Tensor, beat: Callable[[], None] = lambda: None) -> str:
    """16 hexadecimal digits of the type, the shape and the bytes."""
    found = blake2b(_form(value).encode(), digest_size=8)
    rows = value.detach().reshape(1) if value.dim() == 0 else value.detach()
    few = max(1, _AT_ONCE // max(1, rows[:1].numel() * rows.element_size()))
    for at in range(0, len(rows), few):
        found.update(bytes_of(rows[at : at + few]))
        beat()
    return found.hexdigest()


def bytes_of(value: Tensor) -> np.ndarray:
    """The bytes of a tensor, row by row, uint8 [n]."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _form(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _of_data(data: Data, digest: Callable[[Tensor], str]) -> dict[str, str]:
    found = {"classes": str(data.classes)}
    for name, side in (("training", data.train), ("test", data.test)):
        found |= {f"{name} samples": digest(side.x), f"{name} labels": digest(side.y)}
    if data.vocabulary:
        found["vocabulary"] = data.vocabulary.digest()
    for name, owners in zip(("training", "test"), data.owners or (), strict=False):
        found[f"clients of the {name} samples"] = of_tensor(torch.from_numpy(np.asarray(owners)))
    return found


def _of_code(config: Config) -> dict[str, str]:
    """The modules of the user's own that the config names."""
    names = [
        configs.algorithm_name(config.algorithm),
        *(network.name for network in config.model.mix),
    ]
    homes = {
        name.partition(":")[0]
        for name in names
        if ":" in name and not name.startswith("torchvision:")
    }
    return {f"module {home}": blake2b(module_source(home)).hexdigest() for home in sorted(homes)}


def _processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
