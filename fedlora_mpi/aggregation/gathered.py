"""Uploads that travel unexpanded, with different sizes, instead of as terms of a sum.

This pays if the terms are larger than the uploads (see ``Transport.expand``).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..core.tree import Tree
from ..mpi.comm import Comm
from .flat_layout import Layout, joint_dtype


def gather_remote_uploads(
    comm: Comm,
    uploads: Mapping[int, Tensor],
    layouts: Mapping[int, Layout],
    rank_of_client: Mapping[int, int],
) -> dict[int, Tree]:
    """{client: upload} of the clients on other ranks; the uploads are views into one buffer.

    uploads: this rank's, flat; layouts: of all participating clients, in the same order on every
    rank. Numbers travel as float32. If any leaf is float64, every number travels as two float32
    words.
    """
    clients_by_rank = {
        rank: [c for c in layouts if rank_of_client[c] == rank] for rank in range(comm.size)
    }
    dtype = joint_dtype([layout.dtype for layout in layouts.values()])
    words = dtype.itemsize // 4
    counts = [words * sum(layouts[c].size for c in clients) for clients in clients_by_rank.values()]
    send = torch.cat(
        [
            torch.zeros(0, dtype=dtype),
            *(uploads[c].cpu().to(dtype) for c in clients_by_rank[comm.rank]),
        ]
    ).numpy()
    received = torch.from_numpy(comm.gather(send.view(np.float32), counts).view(send.dtype))
    ordered = [c for clients in clients_by_rank.values() for c in clients]
    parts = dict(zip(ordered, received.split([layouts[c].size for c in ordered]), strict=True))
    device = next((u.device for u in uploads.values()), torch.device("cpu"))
    return {
        c: layouts[c].unpack(part.to(device))
        for c, part in parts.items()
        if rank_of_client[c] != comm.rank
    }


def should_gather(
    requested: str, expands: bool, upload_bytes: float, term_layout: Layout, reduce: str
) -> bool:
    """Whether uploads travel unexpanded, so that every rank expands those of all clients.

    With ``auto`` they do if a rank then receives fewer bytes than with the sum of the expanded
    terms. An allreduce sends that sum about twice.

    upload_bytes: of all uploads of a cohort; term_layout: of one expanded upload.
    """
    if requested != "auto":
        return requested == "gather"
    return (
        expands
        and upload_bytes
        < 2 * {"exact": 16, "fast": term_layout.dtype.itemsize}[reduce] * term_layout.size
    )
