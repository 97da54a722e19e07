"""The clients of a federation: who has which network, rank, data and weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..aggregation.flat_layout import Layout, estimate_nbytes
from ..algorithm import Algorithm, Term, Transport, Upload, Variables
from ..core.tree import Tree
from ..engine.train import Trainer


class ClientType(NamedTuple):
    """Clients whose variables have the same shapes, because they have the same network and the same
    ranks.
    """

    trainer: Trainer
    # the variables of any of them before round 1; the shared ones are the server's, for all types
    initial: Variables
    prefix: str = ""  # of their leaves among the personal ones of all types
    network: int = 0  # its number in ``model.mix``

    @property
    def transport(self) -> Transport:
        """How messages of these clients look."""
        return self.trainer.transport

    @property
    def algorithm(self) -> Algorithm:
        """The method as these clients have it."""
        return self.trainer.algorithm

    @property
    def local_initial(self) -> Variables:
        """``initial`` with the shared variables as such a client receives them."""
        return self.initial._replace(shared=self.transport.download(self.initial.shared))

    @property
    def untrained_upload(self) -> Upload:
        """What such a client would send in round 0 without training."""
        return untrained_upload(self.transport, self.initial, self.initial.shared)

    @property
    def untrained_term(self) -> Term:
        """What that upload would add to the aggregate."""
        return self.transport.expand(self.untrained_upload, self.initial.shared, 1)

    @property
    def upload_layout(self) -> Layout:
        """Where the leaves of its upload are in a vector."""
        return Layout.of(self.untrained_upload.message)

    def download_nbytes(self, server: Tree, shared: Tree, round_: int) -> int:
        """Bytes that such a client would receive of the server's variables in a round."""
        download = Layout.of(self.transport.download(shared))
        count = self.transport.download_numel
        numbers = int(count(server, shared, round_)) if count else download.size
        return estimate_nbytes(numbers, [download])


def untrained_upload(transport: Transport, initial: Variables, shared: Tree) -> Upload:
    """What a client would send in round 0 if it returned the server's ``shared`` variables as it
    received them; ``initial``: its variables before round 1.
    """
    v = initial._replace(shared=transport.download(shared))
    return transport.method.upload(v, v, 0)


@dataclass(frozen=True)
class Clients:
    """All clients and what they hold, in one task of a run."""

    types: tuple[ClientType, ...]
    type_of: tuple[int, ...]  # number of each client's type
    sizes: tuple[int, ...]  # training samples of each client
    weights: tuple[int, ...]  # of each client's upload in the mean

    def __len__(self) -> int:
        return len(self.type_of)

    def __getitem__(self, client: int) -> ClientType:
        """The type of a client."""
        return self.types[self.type_of[client]]

    @property
    def trainer(self) -> Trainer:
        """The trainer of the first type; the server knows its network."""
        return self.types[0].trainer

    def by_type(self, clients: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """``clients`` in their order, those of each type together."""
        return tuple(
            tuple(c for c in clients if self.type_of[c] == number)
            for number in range(len(self.types))
        )
