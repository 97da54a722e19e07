"""Uploads that travel as they are, of different sizes, where the sum of what they stand for would
be larger.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..algorithm import Algorithm
from ..core.tree import Tree
from ..mpi.comm import Comm
from .flat_layout import Layout, joint


def gathered(
    comm: Comm,
    uploads: Mapping[int, Tensor],
    layouts: Mapping[int, Layout],
    rank_of: Mapping[int, int],
) -> dict[int, Tree]:
    """{client: upload} of the clients on other ranks, views into one buffer.

    uploads: this rank's, flat; layouts: of all clients that take part, in the same order on every
    rank. Numbers travel as float32, or, where any leaf is float64, as two such words each.
    """
    there = {rank: [c for c in layouts if rank_of[c] == rank] for rank in range(comm.size)}
    dtype = joint([layout.dtype for layout in layouts.values()])
    words = dtype.itemsize // 4
    counts = [words * sum(layouts[c].size for c in clients) for clients in there.values()]
    own = torch.cat(
        [torch.zeros(0, dtype=dtype), *(uploads[c].cpu().to(dtype) for c in there[comm.rank])]
    ).numpy()
    received = torch.from_numpy(comm.gather(own.view(np.float32), counts).view(own.dtype))
    ordered = [c for clients in there.values() for c in clients]
    parts = dict(zip(ordered, received.split([layouts[c].size for c in ordered]), strict=True))
    device = next((u.device for u in uploads.values()), torch.device("cpu"))
    return {
        c: layouts[c].unpack(part.to(device))
        for c, part in parts.items()
        if rank_of[c] != comm.rank
    }


def gathers(asked: str, algorithm: Algorithm, sent: float, term: Layout, reduce: str) -> bool:
    """Whether uploads travel as they are, for every rank to expand those of all. ``auto``: when
    fewer bytes then reach a rank than by the sum of what they stand for, which an allreduce sends
    about twice.

    sent: bytes of a cohort's uploads; term: what one of them stands for.
    """
    if asked != "auto":
        return asked == "gather"
    expands = type(algorithm).expand is not Algorithm.expand
    return expands and sent < 2 * {"exact": 16, "fast": term.dtype.itemsize}[reduce] * term.size
