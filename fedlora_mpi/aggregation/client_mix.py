"""An individual mix for every client, sum_j A_ij u_j, computed over ranks.

The weights A depend on the clients through the Gram matrix of their keys. The Gram matrix and the
product are both separable over coordinates. So the vectors are transposed: a rank receives some
coordinates of ALL clients, mixes them, and sends them back. With the route ``root`` rank 0 receives
all coordinates (a gather and a scatter). With ``spread`` every worker receives an equal part. Both
compute in fixed blocks of coordinates, so both give the same bits on any number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..algorithm import Algorithm, Mix, Variables
from ..core.transfer import to_host
from ..core.tree import Tree, tmap
from ..mpi.comm import Comm
from .exact_sum import LIMIT, ExactSum
from .flat_layout import Layout, joint_dtype

BLOCK = 2**15  # coordinates per matrix product
ROOT_BYTES = 2**30  # up to this size of all vectors together ``auto`` sends them to rank 0


class PackedMix(NamedTuple):
    """A client's offer as flat vectors in memory of their own.

    Each vector is float64 if any of its leaves is, else float32.
    """

    rows: Tensor  # [D]
    key: Tensor  # [K]; the rows themselves when the offer has no key
    extra: Tensor  # [k]

    def is_summable(self) -> bool:
        """Whether all numbers are finite and the key's part of a Gram matrix can be summed."""
        finite = all(torch.isfinite(part).all() for part in self)
        return finite and bool(self.key.double().square().sum() < LIMIT)


@dataclass(frozen=True)
class Mixing:
    """How the mixes of a run are exchanged; the same on every rank."""

    row_layout: Layout
    key_size: int  # numbers of a key; 0: the rows are the key
    key_dtype: torch.dtype  # of the keys in a message
    extra: int  # extra numbers of one client
    centered: bool  # see ``Mix``
    bytes_up: int  # bytes that one client sends for the mix, in addition to its upload
    rank_of_client: tuple[int, ...]
    owners: tuple[int, ...]  # ranks that mix coordinates

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        initial: Variables,
        rank_of_client: Iterable[int],
        workers: Iterable[int],
        route: str,
    ) -> "Mixing | None":
        """The exchange for the offers of ``algorithm``; None if it offers nothing.

        initial: the variables of any client before round 1.
        """
        # copies, so that no two leaves are the same tensor: ``_upload_nbytes`` compares identities
        initial = Variables(
            tmap(Tensor.clone, initial.shared), tmap(Tensor.clone, initial.personal)
        )
        upload = algorithm.upload(initial, initial, 0)
        offer = upload.mix
        if offer is None:
            return None
        rows, rank_of_client = Layout.of(offer.rows), tuple(rank_of_client)
        total_bytes = rows.dtype.itemsize * rows.size * len(rank_of_client)
        spread = route == "spread" or (route == "auto" and total_bytes > ROOT_BYTES)
        key_size, extra = (0 if part is None else part.numel() for part in (offer.key, offer.extra))
        key_dtype = rows.dtype if offer.key is None else joint_dtype([offer.key.dtype])
        upload_bytes = _upload_nbytes(offer, upload.message)
        return cls(
            rows,
            key_size,
            key_dtype,
            extra,
            offer.centered,
            upload_bytes,
            rank_of_client,
            tuple(workers) if spread else (0,),
        )

    @property
    def bytes_down(self) -> int:
        """The bytes that one client receives for the mix."""
        return self.row_layout.nbytes

    @property
    def workers(self) -> tuple[int, ...]:
        """The ranks that mix: those that own coordinates."""
        return self.owners

    def bytes_of(self, client: int, members: Set[int]) -> tuple[int, int]:
        """The bytes that a client of the cohort ``members`` sends for the mix, and those that it
        receives.
        """
        return self.bytes_up, self.bytes_down

    def bytes_mpi(self, members: Set[int], ranks: int) -> int:
        """The bytes that all ranks together pass to MPI for a cohort."""
        clients = len(members)
        vectors = clients * (
            2 * self.row_layout.dtype.itemsize * self.row_layout.size
            + self.key_dtype.itemsize * self.key_size
        )
        return vectors + ranks * ExactSum(clients * (clients + self.extra)).buffer.nbytes

    def additions(self, members: Set[int]) -> int:
        """How many rows are added up for a cohort, on all ranks together."""
        return len(members) ** 2

    def pack(self, offer: Mix) -> PackedMix:
        """A copy of the offer, whose tensors may be views of variables that change later."""
        key, extra = (torch.zeros(0) if part is None else part for part in (offer.key, offer.extra))
        rows, key, extra = to_host(
            [self.row_layout.pack(offer.rows).detach(), key.detach(), extra.detach()]
        )

        def flat(part, dtype):
            return part.flatten().to(dtype, copy=True)

        rows = flat(rows, self.row_layout.dtype)
        return PackedMix(
            rows,
            flat(key, self.key_dtype) if self.key_size else rows,
            flat(extra, joint_dtype([extra.dtype])),
        )

    def mix(
        self,
        comm: Comm,
        algorithm: Algorithm,
        offers: Mapping[int, PackedMix],
        chosen: Iterable[int],
        round_: int,
    ) -> dict[int, Tree]:
        """The mixed rows of this rank's clients.

        offers: of the clients in ``chosen`` on this rank.
        """
        ids = sorted(chosen)
        rows = self._gather_coordinates(
            comm,
            {c: o.rows for c, o in offers.items()},
            ids,
            self.row_layout.size,
            self.row_layout.dtype,
        )
        keys = rows
        if self.key_size:
            keys = self._gather_coordinates(
                comm, {c: o.key for c, o in offers.items()}, ids, self.key_size, self.key_dtype
            )
        gram, extra = self._gram(comm, keys, offers, ids)
        weights = algorithm.mix(gram, extra, round_) if len(ids) > 1 else torch.ones_like(gram)
        assert weights.shape == (len(ids), len(ids)), (
            f"mix gave {list(weights.shape)} for {len(ids)} clients"
        )
        for block in _column_blocks(rows):
            block.copy_(weights @ block.double())
        return {
            c: self.row_layout.unpack(v)
            for c, v in self._scatter_coordinates(comm, rows, ids, self.row_layout.size).items()
        }

    def _gram(
        self,
        comm: Comm,
        keys: Tensor,
        offers: Mapping[int, PackedMix],
        ids: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Inner products of the keys [n, n] and extra numbers [n, k], float64, on every rank."""
        n = len(ids)
        sums = ExactSum(n * (n + self.extra))
        for block in _column_blocks(keys):
            key = block.double()
            key = key - key.mean(0) if self.centered else key
            sums.add((key @ key.T).flatten(), 1)
        for client, offer in offers.items():
            sums.add(offer.extra, 1, offset=n * n + ids.index(client) * self.extra)
        comm.sum(sums.buffer)
        gram, extra = sums.total().split([n * n, n * self.extra])
        return gram.view(n, n), extra.view(n, self.extra)

    def _coordinate_ranges(self, comm: Comm, size: int) -> list[tuple[int, int]]:
        """The coordinates of each rank: whole blocks, divided evenly among the owners."""
        blocks = -(-size // BLOCK)

        def boundary(i):
            return min(size, i * blocks // len(self.owners) * BLOCK)

        range_of_rank = {rank: (boundary(i), boundary(i + 1)) for i, rank in enumerate(self.owners)}
        return [range_of_rank.get(rank, (0, 0)) for rank in range(comm.size)]

    def _clients_by_rank(
        self, comm: Comm, ids: list[int]
    ) -> tuple[list[list[int]], list[int] | slice]:
        """The clients of each rank, and their positions in ``ids``."""
        clients_by_rank = [
            [c for c in ids if self.rank_of_client[c] == rank] for rank in range(comm.size)
        ]
        order = [ids.index(c) for clients in clients_by_rank for c in clients]
        return clients_by_rank, slice(None) if order == sorted(
            order
        ) else order  # a slice copies nothing

    def _gather_coordinates(
        self,
        comm: Comm,
        vectors: Mapping[int, Tensor],
        ids: list[int],
        size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """This rank's coordinates of all clients, [n, width], with rows in the order of ``ids``."""
        ranges, (clients_by_rank, order) = (
            self._coordinate_ranges(comm, size),
            self._clients_by_rank(comm, ids),
        )
        local_clients = [vectors[c] for c in clients_by_rank[comm.rank]]
        send = [v[first:last] for first, last in ranges for v in local_clients]
        first, last = ranges[comm.rank]
        received = exchange(
            comm,
            torch.cat([torch.zeros(0, dtype=dtype), *send]),
            [(b - a) * len(local_clients) for a, b in ranges],
            [(last - first) * len(clients) for clients in clients_by_rank],
        )
        rows = received.view(len(ids), last - first)
        return (
            rows
            if isinstance(order, slice)
            else torch.empty_like(rows).index_copy_(0, torch.tensor(order), rows)
        )

    def _scatter_coordinates(
        self, comm: Comm, mixed: Tensor, ids: list[int], size: int
    ) -> dict[int, Tensor]:
        """The whole vector of each client of this rank; inverse of ``_gather_coordinates``."""
        ranges, (clients_by_rank, order) = (
            self._coordinate_ranges(comm, size),
            self._clients_by_rank(comm, ids),
        )
        width, local_clients = mixed.shape[1], clients_by_rank[comm.rank]
        received = exchange(
            comm,
            mixed[order].reshape(-1),
            [width * len(clients) for clients in clients_by_rank],
            [(b - a) * len(local_clients) for a, b in ranges],
        )
        parts = received.split([(b - a) * len(local_clients) for a, b in ranges])
        local_vectors: Sequence[Tensor] | Tensor = (
            torch.cat(
                [
                    p.view(len(local_clients), b - a)
                    for p, (a, b) in zip(parts, ranges, strict=True)
                ],
                1,
            )
            if local_clients
            else []
        )
        return dict(zip(local_clients, local_vectors, strict=True))


def exchange(
    comm: Comm, send: Tensor, counts: Sequence[int], receive_counts: Sequence[int]
) -> Tensor:
    """The result of ``comm.exchange`` for numbers of the dtype of ``send``.

    A float64 travels as two float32 words.
    """
    numbers, words = send.numpy(), send.dtype.itemsize // 4

    def in_words(counts):
        return [words * number for number in counts]

    received = comm.exchange(numbers.view(np.float32), in_words(counts), in_words(receive_counts))
    return torch.from_numpy(received.view(numbers.dtype))


def _column_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """``rows`` in blocks of columns; one empty block if there are no columns."""
    return rows.split(BLOCK, dim=1)


def _upload_nbytes(offer: Mix, upload: Tree) -> int:
    """The bytes of an offer.

    A bool of the key counts as a bit, and a leaf that is uploaded anyway as nothing.
    """
    new_leaves = [v for v in offer.rows.values() if all(v is not u for u in upload.values())]
    bits = offer.key.numel() if offer.key is not None and offer.key.dtype == torch.bool else 0
    parts = [*new_leaves, offer.extra, None if bits else offer.key]
    return Layout.of({str(at): v for at, v in enumerate(parts) if v is not None}).nbytes - (
        -bits // 8
    )
