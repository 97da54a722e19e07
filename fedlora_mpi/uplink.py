"""Uploads that travel as they are, of different sizes, where the sum of what they stand for would be larger."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .algorithm import Algorithm
from .comm import Comm
from .layout import Layout
from .tree import Tree


def gathered(
    comm: Comm, uploads: Mapping[int, Tensor], layouts: Mapping[int, Layout], rank_of: Mapping[int, int]
) -> dict[int, Tree]:
    """{client: upload} of the clients on other ranks, views into one buffer.

    uploads: this rank's, flat float32; layouts: of all clients that take part, in the same order on every rank.
    """
    there = {rank: [c for c in layouts if rank_of[c] == rank] for rank in range(comm.size)}
    counts = [sum(layouts[c].size for c in clients) for clients in there.values()]
    own = [uploads[c].cpu().float() for c in there[comm.rank]]
    received = torch.from_numpy(comm.gather((torch.cat(own) if own else torch.zeros(0)).numpy(), counts))
    ordered = [c for clients in there.values() for c in clients]
    parts = dict(zip(ordered, received.split([layouts[c].size for c in ordered])))
    device = next((u.device for u in uploads.values()), torch.device("cpu"))
    return {c: layouts[c].unpack(part.to(device)) for c, part in parts.items() if rank_of[c] != comm.rank}


def gathers(asked: str, algorithm: Algorithm, uploads: float, term: int, reduce: str) -> bool:
    """Whether uploads travel as they are, for every rank to expand those of all. ``auto``: when fewer bytes then
    reach a rank than by the sum of what they stand for, which an allreduce sends about twice.

    uploads: numbers that a cohort sends; term: numbers of what one stands for.
    """
    if asked != "auto":
        return asked == "gather"
    expands = type(algorithm).expand is not Algorithm.expand
    return expands and 4 * uploads < 2 * {"exact": 16, "fast": 4}[reduce] * term
