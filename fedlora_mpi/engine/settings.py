"""The ``engine`` block: how a worker computes, as opposed to what it computes."""

from dataclasses import dataclass
from typing import Literal

from ..core.bounds import bounded


@dataclass(frozen=True)
class Engine:
    """``auto`` is decided once at the start of a run and kept on resume, for it changes rounding.

    path: one by one (``loop``) or in a stack; ``auto`` follows a rule that knows only the workload,
    so that the same config always gives the same bits, ``measure`` tries both and several sizes at
    the start and takes the fastest. All but ``loop`` give way to it where a network of the user's
    wants that (see ``rehearsal.py``).

    personal: where the personal leaves of clients wait for their turn: in ``memory``, or in files
    of the run folder (``disk``), of which memory holds those of the cohort. group_size: clients
    trained together; threads: CPU threads of a worker; compile: let torch compile the steps of full
    batches, which takes up to a minute for each size of a stack at the start of every process;
    graphs: whether epochs are recorded and played again, which ``auto`` does on a GPU (same
    numbers); precision: of matrix products and convolutions on a GPU (tf32), or of the forward
    passes of training (bf16, where weights stay float32).
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    path: Literal["auto", "measure", "loop", "stack"] = "auto"
    group_size: int | Literal["auto"] = "auto"
    threads: int = 1
    compile: bool = False
    graphs: bool | Literal["auto"] = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    personal: Literal["memory", "disk"] = "memory"

    def __post_init__(self) -> None:
        if self.group_size != "auto" and self.group_size < 1:
            raise ValueError(
                f"group_size = {self.group_size}: must be an integer of at least 1, or auto"
            )
        bounded(self, threads="[1, inf)")
