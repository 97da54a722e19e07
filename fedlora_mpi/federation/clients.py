"""The clients of a federation: who has which network, rank, data and weight."""

from dataclasses import dataclass
from functools import cached_property

from ..aggregation.flat_layout import Layout, estimate_nbytes
from ..algorithm import Algorithm, Term, Transport, Upload, Variables, low_rank_of
from ..core.names import is_factor
from ..core.tree import Tree
from ..engine.train import Trainer


@dataclass(frozen=True, eq=False)
class ClientType:
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
        """What their messages look like."""
        return self.trainer.transport

    @property
    def algorithm(self) -> Algorithm:
        """The method as these clients have it."""
        return self.trainer.algorithm

    @property
    def local_initial(self) -> Variables:
        """``initial`` with the shared variables as such a client receives them."""
        return self.initial._replace(shared=self.transport.download(self.initial.shared))

    @cached_property
    def untrained_upload(self) -> Upload:
        """What such a client would send in round 0 without training."""
        return self.transport.untrained_upload(self.initial, self.initial.shared)

    @property
    def untrained_term(self) -> Term:
        """What that upload adds to the aggregate."""
        return self.transport.untrained_term(self.initial, self.initial.shared)

    @cached_property
    def upload_layout(self) -> Layout:
        """Where the leaves of its upload are in a vector."""
        return Layout.of(self.untrained_upload.message)

    @property
    def counts_numbers(self) -> bool:
        """Whether its uploads send other numbers than those of ``upload_layout``."""
        upload = self.untrained_upload
        return upload.numel is not None or upload.report is not None

    def download_nbytes(self, server: Tree, shared: Tree, round_: int) -> int:
        """Bytes that such a client would receive of the server's variables in a round."""
        download = Layout.of(self.transport.download(shared))
        count = self.transport.download_numel
        numbers = int(count(server, shared, round_)) if count else download.size
        return estimate_nbytes(numbers, [download])


@dataclass(frozen=True, eq=False)
class Clients:
    """All clients and what they hold in one task. ``clients[k]`` is the type of client k."""

    types: tuple[ClientType, ...]
    type_of: tuple[int, ...]  # number of each client's type
    sizes: tuple[int, ...]  # training samples of each client
    weights: tuple[int, ...]  # of each client's upload in the mean

    def __len__(self) -> int:
        return len(self.type_of)

    def __getitem__(self, client: int) -> ClientType:
        return self.types[self.type_of[client]]

    @property
    def trainer(self) -> Trainer:
        """The trainer of the first type; the server knows its network."""
        return self.types[0].trainer

    def untrained_term(self, shared: Tree) -> Term:
        """What a client of the first type would add to the aggregate without training, given the
        server's ``shared`` variables.
        """
        first, device = self.types[0], self.trainer.device
        personal = {n: v.to(device) for n, v in first.initial.personal.items()}
        return first.transport.untrained_term(Variables(shared, personal), shared)

    def drift_leaves(self) -> tuple[str, ...]:
        """The shared leaves whose drift is measured: parameters of the network, or, where none is
        shared, all leaves but statistics and factors. All of them have the same weight in the mean.
        """
        role, shared = self.trainer.model.role, self.types[0].initial.shared
        term = self.types[0].untrained_term
        terms = term.mean | term.sum
        names = [n for n in terms if n in shared and terms[n].shape == shared[n].shape]
        parameters = [n for n in names if role(n) not in (None, "stats")]
        leaves = parameters or [n for n in names if role(n) != "stats" and not is_factor(n, "ABW")]
        weights = [term.weights.get(n) for n in leaves]
        return tuple(n for n, weight in zip(leaves, weights, strict=True) if weight is weights[0])

    def low_rank(self, network: int) -> dict[str, int]:
        """{weight: rank} of the weights of a network that have a low-rank part; the largest rank
        that any of its clients has.
        """
        ranks: dict[str, int] = {}
        for client_type in (t for t in self.types if t.network == network):
            for v in (client_type.initial, client_type.local_initial):
                for weight, rank in low_rank_of(v).items():
                    ranks[weight] = max(rank, ranks.get(weight, 0))
        return ranks
