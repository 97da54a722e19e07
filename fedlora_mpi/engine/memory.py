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
_COPIES = 8
# times what one forward pass keeps for its backward pass: gradients, and what kernels need in
# between
_SAVED = 2.5
_SHARE = 0.6  # of the memory, for what allocators waste and estimates miss


class Room:
    """How many clients of a stack fit; learned when they do not."""

    def __init__(self) -> None:
        self.most: int | None = None  # None: as many as ever were tried

    def parts(
        self,
        members: Sequence[int],
        compute: Callable[[Sequence[int]], T],
        give_back: Callable[[], None],
    ) -> Iterator[tuple[Sequence[int], T]]:
        """(part, ``compute(part)``) for all of ``members``, in order, in equal parts of as many as
        fit.

        A part for which ``compute`` raises OutOfMemoryError is computed anew in two, after
        ``give_back()``, and so are all as large from then on: group size changes last bits. Raises
        it for a part of one.
        """
        waiting = [members]
        while waiting:
            part = waiting.pop()
            if self.most is not None and len(part) > self.most:
                waiting += reversed(equal_parts(part, self.most))
                continue
            found = _attempt(compute, part)
            if found is None:
                self.most = -(-len(part) // 2)
                waiting.append(part)
                give_back()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                print(
                    f"hint: {len(part)} clients at once do not fit into the GPU's memory, from "
                    f"here on at most {self.most} do: other last bits; "
                    f"engine.group_size={self.most} says so from the start",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            yield part, found[0]
            del found  # before the next part needs its memory


def _attempt(compute: Callable[[Sequence[int]], T], part: Sequence[int]) -> tuple[T] | None:
    """(``compute(part)``,), or None where memory is short, with nothing left of the attempt."""
    try:
        return (compute(part),)
    except torch.OutOfMemoryError:
        if len(part) == 1:
            raise
        return None


def fitting(model: Model, batch_size: int, memory: int) -> int:
    """How many clients of ``model`` a stack may have in ``memory`` bytes of a GPU, at least 1; an
    estimate by what a forward pass of four samples keeps, on the CPU.
    """
    few = min(4, batch_size)
    here = model.to(torch.device("cpu"))
    tree = {n: v.clone().requires_grad_(here.role(n) != "stats") for n, v in here.initial.items()}
    batch = Batch(
        here.zeros(few),
        torch.zeros(few, dtype=torch.int64),
        None,
        torch.tensor(0),
        torch.zeros(model.classes),
    )
    saved: dict[int, int] = {}

    def seen(v: Tensor) -> Tensor:
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda v: v), here.prepared(batch):
        loss = cross_entropy(here(tree, batch.x), batch)
    own = {v.untyped_storage().data_ptr() for v in tree.values()}
    kept = sum(size for at, size in saved.items() if at not in own) * math.ceil(batch_size / few)
    del loss
    return max(1, int(_SHARE * memory / (_COPIES * nbytes(model.initial) + _SAVED * kept)))
