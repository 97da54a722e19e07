"""Export a run for other programs.

The targets are a client's model, the shared leaves, a client's low-rank part for peft, and the
results for PFLlib.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path

import torch

from ..components.lowrank import join_first
from ..core.paths import expand_home
from ..models.weights import pack_safetensors
from ..store.files import write_atomic
from . import peft
from . import pfllib_export as pfllib
from .run_view import RunView

MODEL_SUFFIXES, RESULT_SUFFIXES = (".pt", ".pth", ".safetensors"), (".h5", ".hdf5")


def export(run: RunView, client: int | None, target: Path) -> str:
    """Write the file or folder ``target``; its suffix decides the content.

    ``.pt``, ``.pth`` or ``.safetensors``: the state dict of the client's own model, or the shared
    leaves if ``client`` is None. ``.h5`` or ``.hdf5``: accuracy and loss by round in PFLlib's
    format. Any other name: a folder with peft's adapter of the client. Returns a line about what
    was written. Raises ValueError if the target exists, does not fit ``client``, or cannot be
    written.
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
    """Return the state dict of a client's own model, and its description."""
    return run.client(
        client
    ).model.state_dict(), f" of client {client}'s own model after round {run.checkpoint.round}"


def shared_state_dict(run: RunView) -> tuple[dict[str, torch.Tensor], str]:
    """Return the shared leaves and the network's frozen ones, and their description.

    They may be only a part of a network. Raises ValueError if the method shares nothing.
    """
    leaves = {name: torch.from_numpy(value) for name, value in run.shared.items()}
    if not leaves:
        name = run.config["algorithm"]["name"]
        raise ValueError(
            f"{run.path}: {name} shares nothing, so there is no shared model; give --client"
        )
    network = run.networks[number := min(run.network_of)]
    leaves |= {
        name: v
        for name, v in network.constants.items()
        if name in network.frozen_leaves and not v.is_meta
    }
    personal = run.client(run.network_of.index(number)).variables.personal
    missing = [name for name in network.all_leaves if name not in leaves]
    names_by_reason = {
        "each client has its own": [name for name in missing if name in personal],
        "nobody trains them": [name for name in missing if name not in personal],
    }
    note = "".join(
        f"; {join_first(names)} of the network not, {reason}"
        for reason, names in names_by_reason.items()
        if names
    )
    return leaves, f" that clients share after round {run.checkpoint.round}{note}"


def _write(leaves: dict[str, torch.Tensor], target: Path) -> str:
    """Write a safetensors file, or a torch file that loads with weights_only=True.

    Returns a line about what was written.
    """
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
