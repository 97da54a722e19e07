"""How many clients fit into the memory of a GPU at once: an estimate at the start, corrected when
memory runs out.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.scheduling import equal_parts
from ..core.tree import nbytes, storage_key
from ..models.network import Model

T = TypeVar("T")
# copies of a client's variables: start, trained, momenta, gradients, additions of the method, and
# the values before the epoch
_VARIABLE_COPIES = 8
# times the bytes that a forward pass saves for its backward pass, for gradients and the working
# memory of kernels
_SAVED_FACTOR = 2.5
_USABLE_SHARE = 0.6  # of the memory; the rest covers waste of allocators and errors of the estimate


class MemoryBudget:
    """The number of clients that are computed at once; it falls when memory runs out.

    changes_bits: whether the numbers of a client depend on how many are computed at once.
    """

    def __init__(self, changes_bits: bool = True) -> None:
        self.max_clients: int | None = None  # None: no attempt has failed
        self._remark = ": other last bits" if changes_bits else ""

    def compute_in_parts(
        self,
        members: Sequence[int],
        compute: Callable[[Sequence[int]], T],
        free_memory: Callable[[], None],
    ) -> Iterator[tuple[Sequence[int], T]]:
        """Yield (part, ``compute(part)``) for all of ``members``, in order, in equal parts that fit
        into memory.

        If ``compute`` finds memory short, ``free_memory()`` runs and the part is computed
        again as two halves. From then on no part is larger than these halves. A part of one client
        raises the error.
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
                    f"here on at most {self.max_clients} do{self._remark}; "
                    f"engine.group_size={self.max_clients} says so from the start",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            yield part, result[0]
            del result  # frees its memory before the next part


def _try_compute(compute: Callable[[Sequence[int]], T], part: Sequence[int]) -> tuple[T] | None:
    """Return (``compute(part)``,), or None if memory ran out; nothing of the attempt remains."""
    try:
        return (compute(part),)
    except RuntimeError as error:
        if len(part) == 1 or not is_memory_error(error):
            raise
        return None


def is_memory_error(error: RuntimeError) -> bool:
    """Whether ``error`` says that the memory of a GPU is short.

    Libraries that find too little memory for their own use say so in other words than torch.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error)
    return "unable to find an engine" in message or "STATUS_ALLOC_FAILED" in message


def stack_capacity(model: Model, batch_size: int, memory: int) -> int:
    """The number of clients of ``model`` that a stack may have in ``memory`` bytes of a GPU, at
    least 1.

    It is an estimate from the tensors that a forward pass of four samples saves on the CPU.
    """
    samples = min(4, batch_size)
    cpu_model = model.to(torch.device("cpu"))
    tree = {
        n: v.clone().requires_grad_(cpu_model.role(n) != "stats")
        for n, v in cpu_model.initial.items()
    }
    batch = Batch(
        cpu_model.zero_inputs(samples),
        model.loss.zero_targets(samples, model.classes, model.shape[0]),
        None,
        torch.tensor(0),
        torch.zeros(model.classes),
    )
    saved_storages: dict[int, int] = {}

    def record_storage(v: Tensor) -> Tensor:
        saved_storages[storage_key(v)] = v.untyped_storage().nbytes()
        return v

    with (
        torch.autograd.graph.saved_tensors_hooks(record_storage, lambda v: v),
        cpu_model.training_context(batch),
    ):
        loss = cpu_model.loss(cpu_model(tree, batch.x), batch)
    weight_storages = {storage_key(v) for v in tree.values()}
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
