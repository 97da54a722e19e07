"""The ``engine`` block: how a worker computes, as opposed to what it computes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Engine:
    """``auto`` is decided once at the start of a run and kept on resume, for it changes rounding.

    group_size: clients trained together; threads: CPU threads of a worker.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    path: Literal["auto", "loop", "stack"] = "auto"
    group_size: int | Literal["auto"] = "auto"
    threads: int = 1
    precision: Literal["float32", "tf32"] = "float32"

    def __post_init__(self) -> None:
        if self.group_size != "auto" and self.group_size < 1:
            raise ValueError(f"group_size = {self.group_size}: must be an integer of at least 1, or auto")
        if self.threads < 1:
            raise ValueError(f"threads = {self.threads}: must be an integer of at least 1")
