"""Check that all ranks have built the same run, by a sum of one small table."""

import json
import socket
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from ..aggregation.topology import MixingMatrix
from ..algorithm import Variables
from ..config import Config
from ..core.tree import Tree
from ..data.datasets import Data
from ..data.partition import Split
from ..models.network import Model
from ..models.quantized import QuantizedWeight
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from .fingerprint import (  # fmt: skip
    KINDS,
    PLATFORM_DEPENDENT,
    Inventory,
    Items,
    build_inventory,
    describe_difference,
    describe_platforms,
    hash_items,
    platform_dependent_kinds,
    tensor_bytes,
)

_RANDOMNESS_REMEDY = (
    "a builder or a method draws from a generator of its own or goes through a set; draw from the "
    "global generator of torch, numpy (np.random) or Python, which start alike on all ranks, and "
    "sort what comes from a set"
)
_REMEDIES = dict.fromkeys(KINDS, _RANDOMNESS_REMEDY) | {
    "package": "install one version on all nodes",
    "settings": "give all nodes the same versions of the package and of your own modules",
    "data": "give all nodes the same files, data.{place}",
    "split": "install the same versions of numpy and torch on all nodes",
    "topology": "give all nodes the same file topology.path, or the same versions of torch",
    "code": "give all nodes the same file",
}


def reconcile_ranks(
    comm: Comm,
    config: Config,
    source: str,
    data: Data,
    models: Sequence[Model],
    split: Split,
    initial_variables: Sequence[Variables],
    matrix: MixingMatrix | None = None,
) -> tuple[tuple[Model, ...], Sequence[Variables], Inventory]:
    """Return the networks and initial variables, equal on all ranks, and this rank's inventory.

    If the last bits differ between machines, all ranks use those of rank 0. Raises Refusal on all
    ranks if anything else differs.
    """
    local_inventory = build_inventory(
        config, data, models, split, initial_variables, comm.heartbeat.beat, matrix
    )
    if _compare_ranks(comm, config, source, local_inventory, data):
        return tuple(models), initial_variables, local_inventory
    shared = _broadcast_tree(comm, initial_variables[0].shared)
    initial_variables = [
        Variables(shared, _broadcast_tree(comm, initial.personal)) for initial in initial_variables
    ]
    return (
        tuple(
            replace(
                model,
                initial=_broadcast_tree(comm, model.initial),
                constants=_broadcast_tree(comm, model.constants),
            )
            for model in models
        ),
        initial_variables,
        local_inventory,
    )


def _compare_ranks(
    comm: Comm, config: Config, source: str, local_inventory: Inventory, data: Data
) -> bool:
    """Return whether all ranks have built the same. Raises Refusal.

    Initial values may differ on ranks whose platform differs from rank 0's. The lowest such rank
    prints a warning.
    """
    table = np.zeros((comm.size, len(KINDS)), np.int64)
    table[comm.rank] = [hash_items(local_inventory[kind]) for kind in KINDS]
    comm.sum(table)  # each row is set by one rank
    differing_ranks = {
        kind: set(np.flatnonzero(table[:, column] != table[0, column]).tolist())
        for column, kind in enumerate(KINDS)
    }
    if other_platform_ranks := differing_ranks.pop("platform"):
        _warn_other_platform(comm, other_platform_ranks, local_inventory["platform"])
    for kind, ranks in differing_ranks.items():
        if refused_ranks := sorted(
            ranks - other_platform_ranks if kind in platform_dependent_kinds(config) else ranks
        ):
            _refuse_difference(
                comm, config, source, kind, local_inventory[kind], refused_ranks, data
            )
    return not any(differing_ranks[kind] for kind in PLATFORM_DEPENDENT)


def _broadcast_tree(comm: Comm, tree: Tree) -> Tree:
    """Return the leaves of rank 0. Their names, shapes and types are equal on all ranks."""
    leaves: Tree = {}
    for name, value in tree.items():
        if isinstance(value, QuantizedWeight):
            parts = dict(zip(("levels", "scales"), value.parts, strict=True))
            leaves[name] = value.with_parts(**_broadcast_tree(comm, parts))
            continue
        content = bytearray(comm.broadcast(tensor_bytes(value).tobytes()))
        leaves[name] = (
            torch.frombuffer(content, dtype=value.dtype).view(value.shape) if content else value
        )
    return leaves


def _warn_other_platform(comm: Comm, ranks: Collection[int], local_items: Items) -> None:
    """Print one line about ranks whose platform differs from rank 0's."""
    root_items = json.loads(comm.broadcast(json.dumps(local_items).encode()))
    if comm.rank == min(ranks):
        text = describe_platforms(root_items, local_items, "on rank 0")
        line = (
            f"{describe_ranks(sorted(ranks))}: {text}: bits may differ from those of ranks that "
            "are all alike"
        )
        print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)


def _refuse_difference(
    comm: Comm,
    config: Config,
    source: str,
    kind: str,
    local_items: Items,
    ranks: Sequence[int],
    data: Data,
) -> None:
    """Raise Refusal on all ranks, with the first item of this kind that differs."""
    root_items = json.loads(comm.broadcast(json.dumps(local_items).encode()))
    digests = _sample_digests(data) if kind == "data" else {}
    root_digests = json.loads(comm.broadcast(json.dumps(digests).encode()))

    def report_difference() -> None:
        if comm.rank not in ranks:
            return
        item, text = describe_difference(kind, root_items, local_items, "on rank 0")
        if item in digests:
            pairs = enumerate(zip(root_digests[item], digests[item], strict=False))
            first_index = next(
                (n for n, (a, b) in pairs if a != b),
                min(len(root_digests[item]), len(digests[item])),
            )
            text += f" (the first is number {first_index}, from 0)"
        data_source = config.data.source
        remedy = _REMEDIES[kind].format(place=data_source.place)
        if kind == "data" and data_source.is_function:
            remedy = f"data.{data_source.place} must return the same on all ranks"
        raise ValueError(f"{source}: {describe_ranks(ranks)}: {text}; {remedy}")

    collectively(comm, report_difference)


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return the ranks in words, with the host of this rank, which is one of them."""
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))} (host {socket.gethostname()})"


def _sample_digests(data: Data) -> dict[str, list[str]]:
    """Return a digest of each sample and of each label."""
    digests = {}
    for name, side in (("training", data.train), ("test", data.test)):
        for role, values in (("samples", side.x), ("labels", side.y)):
            digests[f"{name} {role}"] = [
                blake2b(tensor_bytes(v), digest_size=8).hexdigest() for v in values
            ]
    return digests
