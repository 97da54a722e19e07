"""All ranks have built the same, or the run does not begin: one small table is summed."""

import json
import socket
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from ..algorithm import Variables
from ..config import Config
from ..core.tree import Tree
from ..data.datasets import Data
from ..data.partition import Split
from ..models.network import Model
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from .fingerprint import (  # fmt: skip
    COMPUTED,
    KINDS,
    Inventory,
    Items,
    bytes_of,
    computed,
    difference,
    inventory,
    number,
    unlike,
)

_DRAWS = (
    "a builder or a method draws from a generator of its own or goes through a set; draw from the "
    "global generator of torch, numpy (np.random) or Python, which start alike on all ranks, and "
    "sort what comes from a set"
)
_WAY_OUT = dict.fromkeys(KINDS, _DRAWS) | {
    "package": "install one version on all nodes",
    "settings": "give all nodes the same versions of the package and of your own modules",
    "data": "give all nodes the same files, data.root = {root}",
    "split": "install the same versions of numpy and torch on all nodes",
    "code": "give all nodes the same file",
}


def agreed(
    comm: Comm,
    config: Config,
    source: str,
    data: Data,
    models: Sequence[Model],
    split: Split,
    firsts: Sequence[Variables],
) -> tuple[tuple[Model, ...], Sequence[Variables], Inventory]:
    """Networks and first variables that are the same on all ranks, and the inventory of what this
    rank has built.

    What ranks on other machines have computed with other last bits is as rank 0 has it. Raises
    Refused on all ranks where they differ in anything else.
    """
    found = inventory(config, data, models, split, firsts, comm.heartbeat.beat)
    if _same(comm, config, source, found, data):
        return tuple(models), firsts, found
    shared = _from_rank_0(comm, firsts[0].shared)
    firsts = [Variables(shared, _from_rank_0(comm, first.personal)) for first in firsts]
    return (
        tuple(replace(model, initial=_from_rank_0(comm, model.initial)) for model in models),
        firsts,
        found,
    )


def _same(comm: Comm, config: Config, source: str, mine: Inventory, data: Data) -> bool:
    """Whether all ranks have the same; they may differ in first values, where these are of another
    machine.

    The lowest rank on another machine tells of it. Raises Refused.
    """
    table = np.zeros((comm.size, len(KINDS)), np.int64)
    table[comm.rank] = [number(mine[kind]) for kind in KINDS]
    comm.sum(table)  # each row is set by one rank
    odd = {
        kind: set(np.flatnonzero(table[:, at] != table[0, at]).tolist())
        for at, kind in enumerate(KINDS)
    }
    if others := odd.pop("platform"):
        _warn(comm, others, mine["platform"])
    for kind, ranks in odd.items():
        if ranks := sorted(ranks - others if kind in computed(config) else ranks):
            _refuse(comm, config, source, kind, mine[kind], ranks, data)
    return not any(odd[kind] for kind in COMPUTED)


def _from_rank_0(comm: Comm, tree: Tree) -> Tree:
    """The leaves as rank 0 has them; their names, shapes and types are the same on all ranks."""
    found = {}
    for name, value in tree.items():
        sent = bytearray(comm.broadcast(bytes_of(value).tobytes()))
        found[name] = torch.frombuffer(sent, dtype=value.dtype).view(value.shape) if sent else value
    return found


def _warn(comm: Comm, ranks: Collection[int], mine: Items) -> None:
    """One line about ranks on other machines than rank 0's."""
    theirs = json.loads(comm.broadcast(json.dumps(mine).encode()))
    if comm.rank == min(ranks):
        text = unlike(theirs, mine, "on rank 0")
        line = (
            f"{_where(sorted(ranks))}: {text}: bits may differ from those of ranks that are all "
            "alike"
        )
        print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)


def _refuse(
    comm: Comm,
    config: Config,
    source: str,
    kind: str,
    mine: Items,
    ranks: Sequence[int],
    data: Data,
) -> None:
    """Raise Refused on all ranks: the first item of this kind that differs."""
    theirs = json.loads(comm.broadcast(json.dumps(mine).encode()))
    digests = _of_samples(data) if kind == "data" else {}
    expected = json.loads(comm.broadcast(json.dumps(digests).encode()))

    def tell() -> None:
        if comm.rank not in ranks:
            return
        item, text = difference(kind, theirs, mine, "on rank 0")
        if item in digests:
            pairs = enumerate(zip(expected[item], digests[item], strict=False))
            first = next(
                (n for n, (a, b) in pairs if a != b), min(len(expected[item]), len(digests[item]))
            )
            text += f" (the first is number {first}, from 0)"
        way_out = _WAY_OUT[kind].format(root=config.data.source.root)
        raise ValueError(f"{source}: {_where(ranks)}: {text}; {way_out}")

    collectively(comm, tell)


def _where(ranks: Sequence[int]) -> str:
    """The ranks, with the machine of this one, which is the first of them."""
    return (
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} (host {socket.gethostname()})"
    )


def _of_samples(data: Data) -> dict[str, list[str]]:
    """A digest of each sample and of each label."""
    found = {}
    for name, side in (("training", data.train), ("test", data.test)):
        for what, values in (("samples", side.x), ("labels", side.y)):
            found[f"{name} {what}"] = [
                blake2b(bytes_of(v), digest_size=8).hexdigest() for v in values
            ]
    return found
