"""Which clients train together, and which take part in a round.

Groups depend on the clients alone, never on the ranks: a client's numbers may depend on which
others of its group take part (another kernel for another stack), so a group stays whole wherever it
is hosted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..core.seeds import rng
from ..privacy.accountant import epsilon
from ..privacy.settings import Privacy
from .clients import Clients

Group = tuple[int, ...]


def group_clients(
    sizes: Sequence[int], group_size: int, type_of: Sequence[int] | None = None
) -> tuple[Group, ...]:
    """Return the client ids in groups of up to ``group_size``, each of one type (default: there is
    one), larger clients first. The clients of a group are then about equally large, and those still
    training are always the first of the group.
    """
    type_of, client_groups = type_of or [0] * len(sizes), []
    order = sorted(range(len(sizes)), key=lambda client: (-sizes[client], client))
    for number in sorted(set(type_of)):
        same_type = [client for client in order if type_of[client] == number]
        client_groups += [
            tuple(same_type[i : i + group_size]) for i in range(0, len(same_type), group_size)
        ]
    return tuple(client_groups)


def take_cohort(clients: int, fraction: float, permutation: Sequence[int]) -> frozenset[int]:
    """The clients of a round: the first max(1, floor(fraction * clients)) of the
    ``permutation``.
    """
    # 0.29 * 100 is 28.999...
    return frozenset(permutation[: max(1, int(fraction * clients + 1e-9))])


class Cohort(NamedTuple):
    """The clients that take part in a round."""

    round: int  # from 0
    members: frozenset[int]
    clients: Clients  # all clients, with the data of this round's task
    weight: float  # total weight of the members' uploads; under privacy its expectation
    expected_size: float | None = None  # where the server must not know the real one


@dataclass(frozen=True)
class Cohorts:
    """Samples the cohort of each round: a pure function of the seed, so no rank has to send it."""

    tasks: tuple[Clients, ...]  # the clients with their data of each task; one without tasks
    seed: int
    participation: float
    task_rounds: int = 1  # of each task; the last one stays
    privacy: Privacy = Privacy()

    def clients(self, round_: int) -> Clients:
        """All clients, with the data of the task of a round (from 0)."""
        return self.tasks[min(round_ // self.task_rounds, len(self.tasks) - 1)]

    def sample(self, round_: int) -> Cohort:
        """The cohort of a round (from 0), sampled from the clients that hold data."""
        clients = self.clients(round_)
        members = self._sample_members(round_, clients.sizes)
        weight = self.weight_of(members, clients)
        return Cohort(
            round_, members, clients, weight, weight if self.privacy.samples_poisson else None
        )

    def weight_of(self, members: frozenset[int], clients: Clients) -> float:
        """Total weight of the uploads of ``members``; under differential privacy the expectation
        of a cohort's.
        """
        if not self.privacy.is_differential:
            return sum(clients.weights[client] for client in members)
        return (
            self.participation * len(clients)
            if self.privacy.samples_poisson
            else len(self._sample_members(0, clients.sizes))
        )

    def epsilon(self, rounds: int) -> float:
        """The epsilon that so many rounds cost."""
        clients = self.clients(0)
        cohort = len(self._sample_members(0, clients.sizes))
        return epsilon(self.privacy, self.participation, cohort, len(clients), rounds)

    def _sample_members(self, round_: int, sizes: Sequence[int]) -> frozenset[int]:
        if self.privacy.samples_poisson:
            draw = torch.rand(
                len(sizes), generator=rng(self.seed, "cohort", round_), dtype=torch.float64
            )
            return frozenset(
                client for client, number in enumerate(draw.tolist()) if number < self.participation
            )
        order = torch.randperm(len(sizes), generator=rng(self.seed, "cohort", round_)).tolist()
        with_data = [client for client in order if sizes[client]]
        return take_cohort(len(with_data), self.participation, with_data)
