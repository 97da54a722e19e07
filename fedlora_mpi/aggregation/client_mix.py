"""A mix of its own for every client, sum_j A_ij u_j, over ranks.

The weights A depend on the clients through the Gram matrix of their keys, and both the Gram matrix
and the product are separable over coordinates. So the vectors are transposed: a rank receives some
coordinates of ALL clients, works on them, and sends the mixed ones back. By the ``root`` route rank
0 receives all coordinates (a gather and a scatter), by ``spread`` every worker an equal part. The
arithmetic goes by fixed blocks of coordinates, so both give the same bits on any number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..algorithm import Algorithm, Offer, Vars
from ..core.transfer import to_host
from ..core.tree import Tree, tmap
from ..mpi.comm import Comm
from .exact_sum import LIMIT, ExactSum
from .flat_layout import Layout, joint

BLOCK = 2**15  # coordinates of one product
ROOT_BYTES = 2**30  # all vectors together, up to which ``auto`` takes them to rank 0


class Packed(NamedTuple):
    """A client's offer as flat vectors in memory of their own: float64 where any of its leaves is,
    else float32.
    """

    rows: Tensor  # [D]
    key: Tensor  # [K]; the rows themselves when the offer has no key
    aux: Tensor  # [k]

    def fits(self) -> bool:
        """Whether all numbers are finite and the key's part of a Gram matrix can be summed."""
        finite = all(torch.isfinite(part).all() for part in self)
        return finite and bool(self.key.double().square().sum() < LIMIT)


@dataclass(frozen=True)
class Mixing:
    """How the mixes of a run are exchanged; the same on every rank."""

    rows: Layout
    keys: int  # numbers of a key; 0: the rows are the key
    key_dtype: torch.dtype  # in which they travel
    aux: int
    bytes_up: int  # what one client sends for the mix, beside its upload
    rank_of: tuple[int, ...]  # where each client lives
    owners: tuple[int, ...]  # ranks that work on coordinates

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        first: Vars,
        rank_of: Iterable[int],
        workers: Iterable[int],
        route: str,
    ) -> "Mixing | None":
        """The exchange for what ``algorithm`` offers; None when it offers nothing.

        first: the variables of any client before round 1.
        """
        first = Vars(
            tmap(Tensor.clone, first.shared), tmap(Tensor.clone, first.personal)
        )  # no leaf is two leaves
        offer = algorithm.offer(first, first)
        if offer is None:
            return None
        rows, rank_of = Layout.of(offer.rows), tuple(rank_of)
        whole = rows.dtype.itemsize * rows.size * len(rank_of)
        spread = route == "spread" or (route == "auto" and whole > ROOT_BYTES)
        keys, aux = (0 if part is None else part.numel() for part in (offer.key, offer.aux))
        key_dtype = rows.dtype if offer.key is None else joint([offer.key.dtype])
        up = _bytes_up(offer, algorithm.upload(first, first))
        return cls(rows, keys, key_dtype, aux, up, rank_of, tuple(workers) if spread else (0,))

    @property
    def bytes_down(self) -> int:
        """What one client receives of the mix."""
        return self.rows.nbytes

    def bytes_mpi(self, clients: int, ranks: int) -> int:
        """What all ranks together hand to MPI for a cohort of ``clients``."""
        vectors = clients * (
            2 * self.rows.dtype.itemsize * self.rows.size + self.key_dtype.itemsize * self.keys
        )
        return vectors + ranks * ExactSum(clients * (clients + self.aux)).buffer.nbytes

    def pack(self, offer: Offer) -> Packed:
        """A copy of the offer, which may be a view of what goes on changing."""
        key, aux = (torch.zeros(0) if part is None else part for part in (offer.key, offer.aux))
        rows, key, aux = to_host([self.rows.pack(offer.rows).detach(), key.detach(), aux.detach()])

        def flat(part, dtype):
            return part.flatten().to(dtype, copy=True)

        rows = flat(rows, self.rows.dtype)
        return Packed(
            rows, flat(key, self.key_dtype) if self.keys else rows, flat(aux, joint([aux.dtype]))
        )

    def mix(
        self,
        comm: Comm,
        algorithm: Algorithm,
        offers: Mapping[int, Packed],
        chosen: Iterable[int],
        round_: int,
    ) -> dict[int, Tree]:
        """The mixed rows of this rank's clients. ``offers``: of this rank's part of ``chosen``."""
        ids = sorted(chosen)
        rows = self._gathered(
            comm, {c: o.rows for c, o in offers.items()}, ids, self.rows.size, self.rows.dtype
        )
        keys = rows
        if self.keys:
            keys = self._gathered(
                comm, {c: o.key for c, o in offers.items()}, ids, self.keys, self.key_dtype
            )
        gram, aux = self._gram(comm, algorithm.centred, keys, offers, ids)
        weights = algorithm.mix(gram, aux, round_) if len(ids) > 1 else torch.ones_like(gram)
        assert weights.shape == (len(ids), len(ids)), (
            f"mix gave {list(weights.shape)} for {len(ids)} clients"
        )
        for block in _blocks(rows):
            block.copy_(weights @ block.double())
        return {
            c: self.rows.unpack(v)
            for c, v in self._scattered(comm, rows, ids, self.rows.size).items()
        }

    def _gram(
        self, comm: Comm, centred: bool, keys: Tensor, offers: Mapping[int, Packed], ids: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Inner products of the keys [n, n] and the aux numbers [n, k], float64, on every rank."""
        n = len(ids)
        sums = ExactSum(n * (n + self.aux))
        for block in _blocks(keys):
            key = block.double()
            key = key - key.mean(0) if centred else key
            sums.add((key @ key.T).flatten(), 1)
        for client, offer in offers.items():
            sums.add(offer.aux, 1, at=n * n + ids.index(client) * self.aux)
        comm.sum(sums.buffer)
        gram, aux = sums.total().split([n * n, n * self.aux])
        return gram.view(n, n), aux.view(n, self.aux)

    def _ranges(self, comm: Comm, size: int) -> list[tuple[int, int]]:
        """The coordinates of each rank: whole blocks, shared out evenly among the owners."""
        blocks = -(-size // BLOCK)

        def cut(i):
            return min(size, i * blocks // len(self.owners) * BLOCK)

        place = {rank: (cut(i), cut(i + 1)) for i, rank in enumerate(self.owners)}
        return [place.get(rank, (0, 0)) for rank in range(comm.size)]

    def _living(self, comm: Comm, ids: list[int]) -> tuple[list[list[int]], list[int] | slice]:
        """The clients of each rank, and where they stand in ``ids``."""
        living = [[c for c in ids if self.rank_of[c] == rank] for rank in range(comm.size)]
        order = [ids.index(c) for clients in living for c in clients]
        return living, slice(None) if order == sorted(order) else order  # a slice copies nothing

    def _gathered(
        self,
        comm: Comm,
        vectors: Mapping[int, Tensor],
        ids: list[int],
        size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """This rank's coordinates of all clients, [n, width], rows as in ``ids``."""
        ranges, (living, order) = self._ranges(comm, size), self._living(comm, ids)
        mine = [vectors[c] for c in living[comm.rank]]
        send = [v[first:last] for first, last in ranges for v in mine]
        first, last = ranges[comm.rank]
        arrived = _exchanged(
            comm,
            torch.cat([torch.zeros(0, dtype=dtype), *send]),
            [(b - a) * len(mine) for a, b in ranges],
            [(last - first) * len(clients) for clients in living],
        )
        rows = arrived.view(len(ids), last - first)
        return (
            rows
            if isinstance(order, slice)
            else torch.empty_like(rows).index_copy_(0, torch.tensor(order), rows)
        )

    def _scattered(self, comm: Comm, mixed: Tensor, ids: list[int], size: int) -> dict[int, Tensor]:
        """The whole vector of each of this rank's clients: undoes ``_gathered``."""
        ranges, (living, order) = self._ranges(comm, size), self._living(comm, ids)
        width, mine = mixed.shape[1], living[comm.rank]
        arrived = _exchanged(
            comm,
            mixed[order].reshape(-1),
            [width * len(clients) for clients in living],
            [(b - a) * len(mine) for a, b in ranges],
        )
        parts = arrived.split([(b - a) * len(mine) for a, b in ranges])
        whole = (
            torch.cat(
                [p.view(len(mine), b - a) for p, (a, b) in zip(parts, ranges, strict=True)], 1
            )
            if mine
            else []
        )
        return dict(zip(mine, whole, strict=True))


def _exchanged(comm: Comm, send: Tensor, counts: Sequence[int], arriving: Sequence[int]) -> Tensor:
    """What ``comm.exchange`` does, with numbers of the dtype of ``send``: one of float64 travels as
    two words.
    """
    numbers, words = send.numpy(), send.dtype.itemsize // 4

    def times(of):
        return [words * number for number in of]

    arrived = comm.exchange(numbers.view(np.float32), times(counts), times(arriving))
    return torch.from_numpy(arrived.view(numbers.dtype))


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Columns in blocks; one without columns where there are none."""
    return rows.split(BLOCK, dim=1)


def _bytes_up(offer: Offer, upload: Tree) -> int:
    """Bytes of an offer: a bit for a bool, nothing for a leaf that is uploaded anyway."""
    own = [v for v in offer.rows.values() if all(v is not u for u in upload.values())]
    bits = offer.key.numel() if offer.key is not None and offer.key.dtype == torch.bool else 0
    parts = [*own, offer.aux, None if bits else offer.key]
    return Layout.of({str(at): v for at, v in enumerate(parts) if v is not None}).nbytes - (
        -bits // 8
    )
