"""Singular vectors of the server's matrices.

Each matrix is decomposed once. If that is faster, the ranks share the matrices.
"""

import torch
from torch import Tensor

from ..components.lowrank import right_singular_vectors
from ..core.scheduling import assign_groups
from ..core.tree import Tree
from ..mpi.comm import Comm
from .flat_layout import joint_dtype

# ranks share the matrices above this FLOP of all together, about a tenth of a second of a core
_MIN_SHARED_FLOP = 2e9


def right_vectors(comm: Comm, matrices: dict[str, tuple[Tensor, int]]) -> Tree:
    """{name: [k, d2]} of ``matrices`` {name: ([d1, d2], k)}, bit-identical on any number of ranks.

    ``components.lowrank.right_singular_vectors`` computes each. On a GPU one call decomposes all
    matrices of one shape. On a CPU that is not faster and changes the last bits.
    """
    names = list(matrices)
    costs = [25.0 * min(matrix.shape) ** 2 * max(matrix.shape) for matrix, _ in matrices.values()]
    is_shared = comm.size > 1 and sum(costs) > _MIN_SHARED_FLOP
    owner = assign_groups(costs, range(comm.size)) if is_shared else [comm.rank] * len(names)
    local_matrices = {
        name: matrices[name] for name, rank in zip(names, owner, strict=True) if rank == comm.rank
    }
    local_vectors = _decompose(local_matrices)
    if not is_shared:
        return local_vectors
    sizes = [rows * matrix.shape[1] for matrix, rows in matrices.values()]
    buffer = torch.zeros(
        sum(sizes), dtype=joint_dtype([matrix.dtype for matrix, _ in matrices.values()])
    )
    parts = dict(zip(names, buffer.split(sizes), strict=True))
    for name, vectors in local_vectors.items():
        parts[name].copy_(vectors.flatten())
    comm.sum(buffer.numpy())  # each number is set by one rank
    return {
        n: part.to(matrices[n][0]).view(-1, matrices[n][0].shape[1]) for n, part in parts.items()
    }


def _decompose(matrices: dict[str, tuple[Tensor, int]]) -> Tree:
    """The right singular vectors of these matrices, on their device."""
    batches: dict[tuple, list[str]] = {}
    for name, (matrix, rows) in matrices.items():
        batches.setdefault((matrix.shape, rows) if matrix.is_cuda else (name,), []).append(name)
    vectors: Tree = {}
    for names in batches.values():
        stack = torch.stack([matrices[name][0] for name in names])
        vectors |= zip(names, right_singular_vectors(stack, matrices[names[0]][1]), strict=True)
    return {name: vectors[name] for name in matrices}
