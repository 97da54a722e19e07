"""How many clients the memory of a GPU holds at once: an estimate at the start, and what shows
later.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..core.batch import Batch, cross_entropy
from ..core.scheduling import equal_parts
from ..core.tree import nbytes
from ..models.network import Model

T = TypeVar("T")
# of a client's variables: start, trained, momenta, gradients, what a method adds; and the epoch's
# before
_VARIABLE_COPIES = 8
# times what one forward pass keeps for its backward pass: gradients, and what kernels need in
# between
_SAVED_FACTOR = 2.5
_USABLE_SHARE = 0.6  # of the memory, for what allocators waste and estimates miss


class MemoryBudget:
    """How many clients of a stack fit; learned when they do not."""

    def __init__(self) -> None:
        self.max_clients: int | None = None  # None: as many as ever were tried

    def compute_in_parts(
        self,
        members: Sequence[int],
        compute: Callable[[Sequence[int]], T],
        free_memory: Callable[[], None],
    ) -> Iterator[tuple[Sequence[int], T]]:
        """(part, ``compute(part)``) for all of ``members``, in order, in equal parts of as many as
        fit.

        If ``compute`` raises OutOfMemoryError, ``free_memory()`` runs and the part is computed anew
        in two. So are all parts as large from then on: group size changes last bits. A part of
        one raises the error.
        """
        pending = [members]
        while pending:
            part = pending.pop()
            if self.max_clients is not None and len(part) > self.max_clients:
                pending += reversed(equal_parts(part, self.max_clients))
                continue
            result = _try_compute(compute, part)
            if result is None:
                self.max_clients = -(-len(part) // 2)
                pending.append(part)
                free_memory()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                print(
                    f"hint: {len(part)} clients at once do not fit into the GPU's memory, from "
                    f"here on at most {self.max_clients} do: other last bits; "
                    f"engine.group_size={self.max_clients} says so from the start",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            yield part, result[0]
            del result  # before the next part needs its memory


def _try_compute(compute: Callable[[Sequence[int]], T], part: Sequence[int]) -> tuple[T] | None:
    """(``compute(part)``,), or None where memory is short, with nothing left of the attempt."""
    try:
        return (compute(part),)
    except torch.OutOfMemoryError:
        if len(part) == 1:
            raise
        return None


def stack_capacity(model: Model, batch_size: int, memory: int) -> int:
    """How many clients of ``model`` a stack may have in ``memory`` bytes of a GPU, at least 1; an
    estimate by what a forward pass of four samples keeps, on the CPU.
    """
    samples = min(4, batch_size)
    cpu_model = model.to(torch.device("cpu"))
    tree = {
        n: v.clone().requires_grad_(cpu_model.role(n) != "stats")
        for n, v in cpu_model.initial.items()
    }
    batch = Batch(
        cpu_model.zero_inputs(samples),
        torch.zeros(samples, dtype=torch.int64),
        None,
        torch.tensor(0),
        torch.zeros(model.classes),
    )
    saved_storages: dict[int, int] = {}

    def record_storage(v: Tensor) -> Tensor:
        saved_storages[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with (
        torch.autograd.graph.saved_tensors_hooks(record_storage, lambda v: v),
        cpu_model.training_context(batch),
    ):
        loss = cross_entropy(cpu_model(tree, batch.x), batch)
    weight_storages = {v.untyped_storage().data_ptr() for v in tree.values()}
    saved_bytes = sum(
        size for at, size in saved_storages.items() if at not in weight_storages
    ) * math.ceil(batch_size / samples)
    del loss
    return max(
        1,
        int(
            _USABLE_SHARE
            * memory
            / (_VARIABLE_COPIES * nbytes(model.initial) + _SAVED_FACTOR * saved_bytes)
        ),
    )
