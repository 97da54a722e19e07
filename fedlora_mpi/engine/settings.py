"""The ``engine`` block: how a worker computes, as opposed to what it computes."""

from dataclasses import dataclass
from typing import Literal

from ..core.bounds import bounded


@dataclass(frozen=True)
class Engine:
    """Settings of the engine. ``auto`` is resolved once at the start of a run and kept on resume,
    because it changes rounding.

    path: train clients one by one (``loop``), in a stack (``stack``), or several at once on a GPU,
    each on a stream of its own (``streams``, with the bits of the loop). ``auto`` follows a rule
    that depends only on the workload, so the same config always gives the same bits. ``measure``
    times the paths and several stack sizes at the start and takes the fastest. If a user's
    network gives other results in a stack, clients train one by one in every case. If it cannot
    train in a stack at all, ``stack`` raises ValueError and the others use the loop (see
    ``rehearsal.py``).

    personal: where the personal leaves of clients are kept between rounds: in ``memory`` of the
    host, on the ``device`` that trains, which then copies them only for checkpoints and messages,
    or in files of the run folder (``disk``), so that memory holds only those of the cohort.

    group_size: clients trained together. threads: CPU threads of a worker.

    compile: let torch compile the steps of full batches. This takes up to a minute for each stack
    size at the start of every process.

    graphs: whether epochs are recorded and replayed, with the same numbers; ``auto`` does so on a
    GPU.

    convolutions: of a stack, as ``grouped`` convolutions or as batched matrix ``products``.

    gradient_checkpointing: whether training keeps the inputs of a network's blocks alone and
    computes the blocks again for their gradients: less memory, more time, the same numbers. Clients
    then train one by one.

    precision: of matrix products and convolutions on a GPU (tf32), or of the forward passes of
    training (bf16; weights stay float32, see ``half.py``).
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    path: Literal["auto", "measure", "loop", "stack", "streams"] = "auto"
    group_size: int | Literal["auto"] = "auto"
    threads: int = 1
    compile: bool = False
    graphs: bool | Literal["auto"] = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    personal: Literal["memory", "disk", "device"] = "memory"
    convolutions: Literal["grouped", "products"] = "grouped"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.group_size != "auto" and self.group_size < 1:
            raise ValueError(
                f"group_size = {self.group_size}: must be an integer of at least 1, or auto"
            )
        if self.gradient_checkpointing and (self.path in ("measure", "stack") or self.compile):
            key, value = ("compile", "true") if self.compile else ("path", self.path)
            raise ValueError(
                f"{key} = {value}: with gradient_checkpointing clients are neither stacked nor "
                "compiled; leave the key out"
            )
        bounded(self, threads="[1, inf)")
