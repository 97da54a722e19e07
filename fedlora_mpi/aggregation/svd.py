"""Singular vectors of the server's matrices, each computed once, on the ranks in turn where that
pays.
"""

import torch
from torch import Tensor

from ..components.lowrank import right
from ..core.scheduling import assign
from ..core.tree import Tree
from ..mpi.comm import Comm
from .flat_layout import joint

# FLOP of all matrices together, about a tenth of a second of a core, from which ranks share them
_WORTH = 2e9


def right_vectors(comm: Comm, matrices: dict[str, tuple[Tensor, int]]) -> Tree:
    """{name: [k, d2]} of ``matrices`` {name: ([d1, d2], k)}, see ``components.lowrank.right``; the
    same bits on any number of ranks.

    On a GPU all matrices of one shape are decomposed in one call; on a CPU that gains nothing and
    moves bits.
    """
    names = list(matrices)
    costs = [25.0 * min(matrix.shape) ** 2 * max(matrix.shape) for matrix, _ in matrices.values()]
    shared = comm.size > 1 and sum(costs) > _WORTH
    owner = assign(costs, range(comm.size)) if shared else [comm.rank] * len(names)
    mine = {
        name: matrices[name] for name, rank in zip(names, owner, strict=True) if rank == comm.rank
    }
    found = _decomposed(mine)
    if not shared:
        return found
    sizes = [rows * matrix.shape[1] for matrix, rows in matrices.values()]
    buffer = torch.zeros(sum(sizes), dtype=joint([matrix.dtype for matrix, _ in matrices.values()]))
    parts = dict(zip(names, buffer.split(sizes), strict=True))
    for name, vectors in found.items():
        parts[name].copy_(vectors.flatten())
    comm.sum(buffer.numpy())  # each number is set by one rank
    return {
        n: part.to(matrices[n][0]).view(-1, matrices[n][0].shape[1]) for n, part in parts.items()
    }


def _decomposed(matrices: dict[str, tuple[Tensor, int]]) -> Tree:
    """The vectors of these matrices, on their device."""
    together: dict[tuple, list[str]] = {}
    for name, (matrix, rows) in matrices.items():
        together.setdefault((matrix.shape, rows) if matrix.is_cuda else (name,), []).append(name)
    found = {}
    for names in together.values():
        stack = torch.stack([matrices[name][0] for name in names])
        found |= zip(names, right(stack, matrices[names[0]][1]), strict=True)
    return {name: found[name] for name in matrices}
