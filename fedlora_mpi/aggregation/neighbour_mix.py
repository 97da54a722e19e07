"""The mix of every client with its neighbours, sum_j W_ij u_j, computed over ranks.

W is constant (``topology``), so no Gram matrix is computed. The rank of a client receives the rows
of the client's neighbours, each once. The sums are exact, so they have the same bits on any number
of ranks. Where all weights of a sum are equal, it is the exact mean that FedAvg would have.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm import Algorithm, Mix
from ..core.transfer import to_host
from ..core.tree import Tree, tmap
from ..mpi.comm import Comm
from .client_mix import PackedMix, exchange
from .exact_sum import ExactSum, absorb_rounding
from .flat_layout import Layout
from .topology import MixingMatrix


@dataclass(frozen=True)
class NeighbourMixing:
    """How the mixes of a run over a topology are exchanged; the same on every rank."""

    matrix: MixingMatrix
    row_layout: Layout
    rank_of_client: tuple[int, ...]
    workers: tuple[int, ...]  # ranks that mix

    @classmethod
    def of(
        cls,
        offer: Mix,
        matrix: MixingMatrix,
        rank_of_client: Iterable[int],
        workers: Iterable[int],
    ) -> "NeighbourMixing":
        """The exchange of offers like ``offer``, that of any client before round 1."""
        return cls(matrix, Layout.of(offer.rows), tuple(rank_of_client), tuple(workers))

    def bytes_of(self, client: int, members: Set[int]) -> tuple[int, int]:
        """The bytes that a client of the cohort ``members`` sends, and those that it receives: its
        rows to each neighbour, and the rows of each.
        """
        degree = len(self.matrix.senders(client, members)) - 1
        return degree * self.row_layout.nbytes, degree * self.row_layout.nbytes

    def bytes_mpi(self, members: Set[int], ranks: int) -> int:
        """The bytes that all ranks together pass to MPI for a cohort."""
        rows = sum(len(self._wanted_rows(rank, frozenset(members))) for rank in range(ranks))
        return rows * self.row_layout.dtype.itemsize * self.row_layout.size

    def additions(self, members: Set[int]) -> int:
        """How many rows are added up for a cohort, on all ranks together."""
        return sum(len(self.matrix.senders(client, members)) for client in members)

    def pack(self, offer: Mix) -> PackedMix:
        """A copy of the offer, whose tensors may be views of variables that change later."""
        (vector,) = to_host([self.row_layout.pack(offer.rows).detach()])
        rows = vector.flatten().to(self.row_layout.dtype, copy=True)
        return PackedMix(rows, rows, torch.zeros(0))

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
        members = frozenset(chosen)
        rows = {client: offer.rows for client, offer in offers.items()}
        rows |= self._receive_rows(comm, rows, members)
        sums: dict[tuple, Tensor] = {}  # clients with equal neighbours and weights have one sum
        mixed = {}
        for client in sorted(offers):
            weights = tuple(self.matrix.row(client, members).items())
            if weights not in sums:
                sums[weights] = weighted_sum(rows, dict(weights))
            before = self.row_layout.unpack(rows[client])
            mixed[client] = tmap(absorb_rounding, self.row_layout.unpack(sums[weights]), before)
        return mixed

    def _wanted_rows(self, rank: int, members: Set[int]) -> list[int]:
        """The clients on other ranks whose rows this rank needs, by their ranks and numbers."""
        receivers = [client for client in members if self.rank_of_client[client] == rank]
        senders = {sender for c in receivers for sender in self.matrix.senders(c, members)}
        remote = (client for client in senders if self.rank_of_client[client] != rank)
        return sorted(remote, key=lambda client: (self.rank_of_client[client], client))

    def _receive_rows(
        self, comm: Comm, rows: Mapping[int, Tensor], members: Set[int]
    ) -> dict[int, Tensor]:
        """The rows of the neighbours that other ranks host."""
        size, ranks = self.row_layout.size, range(comm.size)
        sent = [[c for c in self._wanted_rows(rank, members) if c in rows] for rank in ranks]
        wanted = self._wanted_rows(comm.rank, members)
        sources = [self.rank_of_client[client] for client in wanted]
        received = exchange(
            comm,
            torch.cat(
                [
                    torch.zeros(0, dtype=self.row_layout.dtype),
                    *(rows[c] for clients in sent for c in clients),
                ]
            ),
            [size * len(clients) for clients in sent],
            [size * sources.count(rank) for rank in ranks],
        )
        return dict(zip(wanted, received.view(len(wanted), size), strict=True))


def weighted_sum(rows: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """sum_j w_j u_j [D], float64, for weights that sum to 1.

    Equal weights give the exact sum, divided once: what a server's exact mean has.
    """
    is_mean = max(weights.values()) - min(weights.values()) < 1e-12
    total = ExactSum(len(rows[next(iter(weights))]))
    for sender, weight in weights.items():
        total.add(rows[sender], 1 if is_mean else weight)
    return total.total() / (len(weights) if is_mean else 1)
