"""A federation: who takes part, on which rank, with what. ``State`` is all that changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..aggregation.aggregator import Aggregator
from ..aggregation.client_mix import Mixing
from ..algorithm import Algorithm
from ..core.tree import Tree
from ..mpi.comm import Comm
from .client_store import ClientStore
from .clients import Clients
from .cohorts import Cohorts
from .instruments import Instruments
from .placement import Placement


@dataclass(frozen=True)
class Federation:
    """The objects that a round uses, each with one job. They are chosen once, at assembly."""

    algorithm: Algorithm
    comm: Comm
    clients: Clients  # with all their data, of all tasks together
    cohorts: Cohorts
    placement: Placement
    store: ClientStore
    aggregator: Aggregator
    instruments: Instruments
    # whether those who are evaluated in a round are its cohort; else everybody is
    evaluate_cohort_only: bool = False

    def on_ranks(
        self, comm: Comm, hosts: Sequence[int], workers: Sequence[int], route: str
    ) -> "Federation":
        """This federation on the ranks of ``comm``, its groups on the ranks ``hosts``.

        workers: the ranks that host clients; route: of mixes, see ``Mixing.of``. Personal rows do
        not move, and nothing of them is replicated.
        """
        placement = replace(self.placement, rank=comm.rank, rank_of_group=tuple(hosts))
        ranks = placement.rank_of_client
        initial, clients = self.clients.types[0].initial, range(len(self.clients))
        aggregator = replace(
            self.aggregator,
            comm=comm,
            rank_of_client=ranks,
            mixing=Mixing.of(self.algorithm, initial, [ranks[c] for c in clients], workers, route),
            all_reduce=None,
        )
        store = ClientStore(self.clients, placement, self.store.rows)
        return replace(self, comm=comm, placement=placement, store=store, aggregator=aggregator)


class State(NamedTuple):
    """Everything that changes from round to round, and so all that a checkpoint holds."""

    round: int  # rounds done
    server: Tree  # the server's own, equal on all ranks
    shared: Tree  # equal on all ranks
    # of each type [its clients on this rank, ...]; owned by the rank, and written to; see
    # ``ClientStore``
    personal: Tree
