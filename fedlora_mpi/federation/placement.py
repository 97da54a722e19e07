"""Which rank hosts which group of clients, and which clients compute together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..core.scheduling import equal_parts
from .clients import Clients
from .cohorts import Cohort, Group


@dataclass(frozen=True)
class Placement:
    """The groups of clients and the ranks that host them, as ``rank`` sees it."""

    rank: int
    groups: tuple[Group, ...]  # each of one type
    costs: tuple[float, ...]  # of each group, FLOP or any unit
    rank_of_group: tuple[int, ...]
    group_size: int  # clients that compute together, about as many as a group has in a cohort
    type_of: tuple[int, ...]  # number of each client's type

    @cached_property
    def rank_of_client(self) -> dict[int, int]:
        """The rank that hosts each client."""
        return {
            client: rank
            for group, rank in zip(self.groups, self.rank_of_group, strict=True)
            for client in group
        }

    @cached_property
    def local_clients(self) -> tuple[int, ...]:
        """The clients of this rank, type after type."""
        return self.clients_of(self.rank)

    @cached_property
    def local_clients_by_type(self) -> tuple[tuple[int, ...], ...]:
        """The clients of this rank by type, in the order of the rows of their personal leaves."""
        return tuple(
            tuple(c for c in self.local_clients if self.type_of[c] == number)
            for number in range(max(self.type_of) + 1)
        )

    @cached_property
    def row_of_client(self) -> dict[int, int]:
        """The row of the personal leaves of each client of this rank."""
        return {
            client: row
            for clients in self.local_clients_by_type
            for row, client in enumerate(clients)
        }

    def clients_of(self, rank: int) -> tuple[int, ...]:
        """The clients that a rank hosts, type after type."""
        return tuple(client for group in self.groups_of(rank) for client in group)

    def groups_of(self, rank: int) -> Iterator[Group]:
        """The groups that a rank hosts."""
        return (
            group
            for group, group_rank in zip(self.groups, self.rank_of_group, strict=True)
            if group_rank == rank
        )

    def stacks(self, cohort: Cohort) -> Iterator[Sequence[int]]:
        """This rank's part of a cohort, as the clients that train together."""
        for group in self.groups_of(self.rank):
            members = [client for client in group if client in cohort.members]
            yield from self.split_into_stacks(members, cohort.clients)

    def split_into_stacks(
        self, clients: Iterable[int], of: Clients, at_least: int = 1
    ) -> list[Sequence[int]]:
        """``clients`` of a group, those with the most samples first, in equal parts.

        A part has at most ``group_size`` clients, or ``at_least`` where that is more.
        """
        # clients of equal size stay in the order of the group
        order = sorted(clients, key=lambda client: -of.sizes[client])
        return equal_parts(order, max(self.group_size, at_least))
