"""A run for other programs: a client's model, the shared part, its low-rank part for peft, its
results for PFLlib.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path

import torch

from ..core.paths import expanded
from ..models.weights import packed
from ..store.files import write_atomic
from . import peft
from . import pfllib_export as pfllib
from .run_view import RunView

MODELS, RESULTS = (".pt", ".pth", ".safetensors"), (".h5", ".hdf5")


def export(run: RunView, client: int | None, to: Path) -> str:
    """Write what the name ``to`` asks for; what was done, in a line.

    ``.pt``, ``.pth`` or ``.safetensors``: the state dict of the client's own model, without a
    client the shared leaves. ``.h5``: accuracy and loss by round, as PFLlib keeps them. A folder:
    peft's adapter of the client. Raises ValueError.
    """
    to = expanded(to)
    kind = to.suffix.lower()
    if kind in RESULTS and client is not None:
        raise ValueError(
            f"--to {to}: holds results of all clients; leave out --client, or name a file "
            f"{', '.join(MODELS)}"
        )
    if kind not in (*MODELS, *RESULTS):
        if client is None:
            files = ", ".join((*MODELS, *RESULTS))
            raise ValueError(
                f"--to {to}: a folder is for peft's adapter of one client; give --client, or name "
                f"a file {files}"
            )
        return str(peft.export(run, client, to))
    if os.path.lexists(to):
        raise ValueError(f"--to {to}: is there already; choose another")
    try:
        if kind in RESULTS:
            return pfllib.write_results(run, to)
        leaves, said = _shared(run) if client is None else _own(run, client)
        return _write(leaves, to) + said
    except OSError as error:
        raise ValueError(
            f"--to {to}: cannot be written: {error.strerror}; choose another"
        ) from error


def _own(run: RunView, client: int) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict of a client's own model."""
    return run.client(
        client
    ).model.state_dict(), f" of client {client}'s own model after round {run.checkpoint.round}"


def _shared(run: RunView) -> tuple[dict[str, torch.Tensor], str]:
    """The shared leaves; together they may be no whole network."""
    leaves = {name: torch.from_numpy(value) for name, value in run.shared.items()}
    if not leaves:
        name = run.config["algorithm"]["name"]
        raise ValueError(
            f"{run.path}: {name} shares nothing, so there is no shared model; give --client"
        )
    network = run.networks[0]
    leaves |= {
        name: v for name, v in network.constants.items() if name in network.locked and not v.is_meta
    }
    missing = [name for name in network.described if name not in leaves]
    part = (
        f"; {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} of the network not, each "
        "client has its own"
        if missing
        else ""
    )
    return leaves, f" that clients share after round {run.checkpoint.round}{part}"


def _write(leaves: dict[str, torch.Tensor], to: Path) -> str:
    """A file of torch, to be loaded with weights_only=True, or of safetensors."""
    whole = OrderedDict(
        (name, value.detach().clone(memory_format=torch.contiguous_format))
        for name, value in leaves.items()
    )
    if to.suffix.lower() == ".safetensors":
        write_atomic(to, packed(whole))
    else:
        content = io.BytesIO()
        torch.save(whole, content)
        write_atomic(to, content.getvalue())
    return f"{to}: {len(whole)} leaves"
