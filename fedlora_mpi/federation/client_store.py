"""Where the personal leaves of a rank's clients live, stacked: in memory of the host or of a GPU,
or in files of which memory holds what is used.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..core.disk_errors import explain_write_errors
from ..core.tree import Tree
from ..core.units import format_bytes
from .clients import Clients
from .placement import Placement


class RowStorage(Protocol):
    """Makes the stacked leaves of a rank."""

    def allocate(self, clients: int, like: Tensor) -> Tensor:
        """A tensor [clients, *like.shape] with any numbers in it."""

    def release(self) -> None:
        """Nobody needs the rows until they are touched again."""


@dataclass(frozen=True)
class MemoryRows:
    """Ordinary tensors on ``device``."""

    device: torch.device = torch.device("cpu")

    def allocate(self, clients: int, like: Tensor) -> Tensor:
        """Raises ValueError when a GPU has no room."""
        try:
            return torch.empty((clients, *like.shape), dtype=like.dtype, device=self.device)
        except torch.OutOfMemoryError:
            size = format_bytes(clients * like.numel() * like.element_size())
            raise ValueError(
                f"engine.personal = device: {self.device} has no room for {size} more of the "
                f"personal leaves of {clients} clients; engine.personal=memory has it"
            ) from None

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


@dataclass(frozen=True)
class ClientStore:
    """Reads and writes the personal leaves of this rank's clients.

    The leaves themselves are ``State.personal``: of each type [its clients on this rank, ...], in
    the order of ``Placement.local_clients_by_type``, under the type's prefix.
    """

    clients: Clients
    placement: Placement
    rows: RowStorage = MemoryRows()

    def allocate(self) -> Tree:
        """Room for the personal leaves of this rank's clients, not initialized."""
        leaves: Tree = {}
        for client_type, clients in zip(
            self.clients.types, self.placement.local_clients_by_type, strict=True
        ):
            leaves |= {
                client_type.prefix + n: self.rows.allocate(len(clients), v)
                for n, v in client_type.initial.personal.items()
            }
        return leaves

    def read(self, personal: Tree, clients: Sequence[int]) -> Tree:
        """The personal leaves [C, ...] of clients of one type; views if the rows are adjacent, as
        at full participation.
        """
        client_type = self.clients[clients[0]]
        rows = [self.placement.row_of_client[c] for c in clients]
        is_contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        selection = slice(rows[0], rows[0] + len(rows)) if is_contiguous else rows
        return {
            n: personal[client_type.prefix + n][selection] for n in client_type.initial.personal
        }

    def write(self, personal: Tree, client: int, leaves: Tree) -> None:
        """Write personal leaves of a client into its row."""
        prefix, row = self.clients[client].prefix, self.placement.row_of_client[client]
        for name, value in leaves.items():
            personal[prefix + name][row] = value

    def release(self) -> None:
        """Nobody needs the rows until they are touched again."""
        self.rows.release()
