"""A federation: who takes part, on which rank, with what. ``State`` is all that changes."""

from dataclasses import dataclass
from typing import NamedTuple

from ..aggregation.aggregator import Aggregator
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


class State(NamedTuple):
    """Everything that changes from round to round, and so all that a checkpoint holds."""

    round: int  # rounds done
    server: Tree  # the server's own, equal on all ranks
    shared: Tree  # equal on all ranks
    # of each type [its clients on this rank, ...]; owned by the rank, and written to; see
    # ``ClientStore``
    personal: Tree
