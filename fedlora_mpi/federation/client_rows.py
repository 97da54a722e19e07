"""Where the personal leaves of a rank's clients live, stacked: in memory, or in files of which
memory holds what is used.
"""

import mmap
import os
import tempfile
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..core.disk_errors import explain_write_errors


class RowStorage(Protocol):
    """Makes the stacked leaves of a rank."""

    def allocate(self, clients: int, like: Tensor) -> Tensor:
        """A tensor [clients, *like.shape] on the CPU with any numbers in it."""

    def release(self) -> None:
        """Nobody needs the rows until they are touched again."""


class MemoryRows:
    """Ordinary tensors."""

    def allocate(self, clients: int, like: Tensor) -> Tensor:
        return torch.empty((clients, *like.shape), dtype=like.dtype)

    def release(self) -> None:
        pass


class DiskRows:
    """Tensors mapped to files without a name in ``folder``, which go with the process, however it
    ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: WeakSet[mmap.mmap] = WeakSet()

    def allocate(self, clients: int, like: Tensor) -> Tensor:
        """Raises WriteError when the disk is full: the room is taken at once."""
        if not clients * like.numel():
            return MemoryRows().allocate(clients, like)
        size = clients * like.numel() * like.element_size()
        with (
            explain_write_errors(self._folder / "personal leaves"),
            tempfile.TemporaryFile(dir=self._folder) as file,
        ):
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=like.dtype).view(clients, *like.shape)

    def release(self) -> None:
        for mapped in self._maps:
            # of a shared map of a file: the numbers stay, in the file
            mapped.madvise(mmap.MADV_DONTNEED)
