"""A run for other programs: a client's model, the shared part, its low-rank part for peft, its
results for PFLlib.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path

import torch

from ..core.paths import expand_home
from ..models.weights import pack_safetensors
from ..store.files import write_atomic
from . import peft
from . import pfllib_export as pfllib
from .run_view import RunView

MODEL_SUFFIXES, RESULT_SUFFIXES = (".pt", ".pth", ".safetensors"), (".h5", ".hdf5")


def export(run: RunView, client: int | None, target: Path) -> str:
    """Write what the name ``to`` asks for; what was done, in a line.

    ``.pt``, ``.pth`` or ``.safetensors``: the state dict of the client's own model, without a
    client the shared leaves. ``.h5``: accuracy and loss by round, as PFLlib keeps them. A folder:
    peft's adapter of the client. Raises ValueError.
    """
    target = expand_home(target)
    suffix = target.suffix.lower()
    if suffix in RESULT_SUFFIXES and client is not None:
        raise ValueError(
            f"--to {target}: holds results of all clients; leave out --client, or name a file "
            f"{', '.join(MODEL_SUFFIXES)}"
        )
    if suffix not in (*MODEL_SUFFIXES, *RESULT_SUFFIXES):
        if client is None:
            files = ", ".join((*MODEL_SUFFIXES, *RESULT_SUFFIXES))
            raise ValueError(
                f"--to {target}: a folder is for peft's adapter of one client; give --client, or "
                f"name a file {files}"
            )
        return str(peft.export_adapter(run, client, target))
    if os.path.lexists(target):
        raise ValueError(f"--to {target}: is there already; choose another")
    try:
        if suffix in RESULT_SUFFIXES:
            return pfllib.write_results(run, target)
        leaves, description = (
            shared_state_dict(run) if client is None else client_state_dict(run, client)
        )
        return _write(leaves, target) + description
    except OSError as error:
        raise ValueError(
            f"--to {target}: cannot be written: {error.strerror}; choose another"
        ) from error


def client_state_dict(run: RunView, client: int) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict of a client's own model."""
    return run.client(
        client
    ).model.state_dict(), f" of client {client}'s own model after round {run.checkpoint.round}"


def shared_state_dict(run: RunView) -> tuple[dict[str, torch.Tensor], str]:
    """The shared leaves; together they may be no whole network."""
    leaves = {name: torch.from_numpy(value) for name, value in run.shared.items()}
    if not leaves:
        name = run.config["algorithm"]["name"]
        raise ValueError(
            f"{run.path}: {name} shares nothing, so there is no shared model; give --client"
        )
    network = run.networks[0]
    leaves |= {
        name: v
        for name, v in network.constants.items()
        if name in network.frozen_leaves and not v.is_meta
    }
    missing = [name for name in network.all_leaves if name not in leaves]
    missing_note = (
        f"; {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} of the network not, each "
        "client has its own"
        if missing
        else ""
    )
    return leaves, f" that clients share after round {run.checkpoint.round}{missing_note}"


def _write(leaves: dict[str, torch.Tensor], target: Path) -> str:
    """A file of torch, to be loaded with weights_only=True, or of safetensors."""
    state_dict = OrderedDict(
        (name, value.detach().clone(memory_format=torch.contiguous_format))
        for name, value in leaves.items()
    )
    if target.suffix.lower() == ".safetensors":
        write_atomic(target, pack_safetensors(state_dict))
    else:
        content = io.BytesIO()
        torch.save(state_dict, content)
        write_atomic(target, content.getvalue())
    return f"{target}: {len(state_dict)} leaves"
