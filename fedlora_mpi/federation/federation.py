"""A federation: who takes part, on which rank, with what. ``State`` is all that changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..aggregation.aggregator import Aggregator
from ..aggregation.client_mix import Mixing
from ..aggregation.neighbour_mix import NeighbourMixing
from ..aggregation.protection import Protection
from ..aggregation.term_layout import TermLayout
from ..aggregation.topology import MixingMatrix
from ..algorithm import Algorithm
from ..core.names import display_name
from ..core.tree import Tree
from ..mpi.comm import Comm
from .client_store import ClientStore, MemoryRows, RowStorage
from .clients import Clients
from .cohorts import Cohorts
from .instruments import Instruments
from .placement import Placement

SCORES = ("accuracy", "loss", "accuracy_aggregated", "accuracy_trained")  # of each client
CONSENSUS = "consensus_distance"  # of each client, over a topology


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
    matrix: MixingMatrix | None = None  # W of the topology, if there is one

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the metrics of an evaluation."""
        return self.clients.trainer.metrics

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of the numbers that an evaluation gives for each client."""
        return (*SCORES, *self.metrics, *((CONSENSUS,) if self.matrix else ()))

    @classmethod
    def build(
        cls,
        algorithm: Algorithm,
        comm: Comm,
        cohorts: Cohorts,
        placement: Placement,
        clients: Clients | None = None,
        *,
        workers: Sequence[int] = (0,),
        route: str = "auto",
        reduce: str = "exact",
        gathers: bool = False,
        skip_nonfinite: bool = False,
        protection: Protection | None = None,
        rows: RowStorage | None = None,
        evaluate_cohort_only: bool = False,
        matrix: MixingMatrix | None = None,
    ) -> "Federation":
        """The federation of these clients; ``clients``: with all their data, if there are tasks.

        workers: the ranks that host clients; route: of mixes, see ``Mixing.of``. The other
        arguments are fields of ``Aggregator``, ``ClientStore`` and this class.
        """
        clients = clients or cohorts.tasks[0]
        first = clients.types[0]
        terms = TermLayout.of(first.untrained_term)
        if algorithm.absent == "stale":
            _check_stale(terms, first.initial.shared)
        aggregator = Aggregator(
            comm=comm,
            algorithm=algorithm,
            terms=terms,
            untrained_term=clients.untrained_term,
            drift_leaves=clients.drift_leaves(),
            reduce=reduce,
            rank_of_client=placement.rank_of_client,
            untrained_upload=first.untrained_upload,
            counts_numbers=any(t.counts_numbers for t in clients.types),
            protection=protection or Protection(),
            gathers=gathers,
            skip_nonfinite=skip_nonfinite,
            mixing=_mixing_of(algorithm, clients, placement, workers, route, matrix),
        )
        return cls(
            algorithm,
            comm,
            clients,
            cohorts,
            placement,
            ClientStore(clients, placement, rows or MemoryRows()),
            aggregator,
            Instruments(clients, comm.heartbeat, prints_hint=comm.rank == 0),
            evaluate_cohort_only,
            matrix,
        )

    def on_ranks(
        self, comm: Comm, hosts: Sequence[int], workers: Sequence[int], route: str
    ) -> "Federation":
        """This federation on the ranks of ``comm``, its groups on the ranks ``hosts``.

        workers and route: see ``build``. Personal rows do not move, and nothing of them is
        replicated.
        """
        placement = replace(self.placement, rank=comm.rank, rank_of_group=tuple(hosts))
        aggregator = replace(
            self.aggregator,
            comm=comm,
            rank_of_client=placement.rank_of_client,
            mixing=_mixing_of(self.algorithm, self.clients, placement, workers, route, self.matrix),
            all_reduce=None,
        )
        store = ClientStore(self.clients, placement, self.store.rows)
        return replace(self, comm=comm, placement=placement, store=store, aggregator=aggregator)


def _check_stale(terms: TermLayout, shared: Tree) -> None:
    """Raise ValueError if absent clients have no value for some leaf of the mean."""
    present = terms.flat.common_leaves(shared)
    if foreign := [display_name(n) for n in terms.mean if n not in present]:
        raise ValueError(
            f"absent = stale: absent clients have no {foreign[0]}, which is no shared variable; "
            "choose exclude"
        )


def _mixing_of(
    algorithm: Algorithm,
    clients: Clients,
    placement: Placement,
    workers: Sequence[int],
    route: str,
    matrix: MixingMatrix | None,
) -> Mixing | NeighbourMixing | None:
    """How per-client mixes are exchanged between these ranks; None: the method has none."""
    ranks = [placement.rank_of_client[client] for client in range(len(clients))]
    offer = clients.types[0].untrained_upload.mix
    if matrix and offer:
        return NeighbourMixing.of(offer, matrix, ranks, workers)
    return Mixing.of(algorithm, clients.types[0].initial, ranks, workers, route)


class State(NamedTuple):
    """Everything that changes from round to round, and so all that a checkpoint holds."""

    round: int  # rounds done
    server: Tree  # the server's own, equal on all ranks
    shared: Tree  # equal on all ranks
    # of each type [its clients on this rank, ...]; owned by the rank, and written to; see
    # ``ClientStore``
    personal: Tree
