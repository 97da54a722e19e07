"""Who takes part in a run, on which rank, with what: all that is fixed, and all that changes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..aggregation.client_mix import Mixing
from ..aggregation.flat_layout import Layout, estimate_nbytes
from ..algorithm import Algorithm, Variables
from ..core.clock import Stopwatch
from ..core.scheduling import equal_parts
from ..core.seeds import rng
from ..core.tree import Tree, tmap
from ..engine.flops import Flops
from ..engine.train import Trainer
from ..mpi.comm import Comm
from ..privacy.accountant import epsilon
from ..privacy.check import untrained_contribution
from ..privacy.settings import Privacy
from .client_rows import MemoryRows, RowStorage
from .cohorts import Group, take_cohort


class ClientType(NamedTuple):
    """Clients whose variables have the same shapes, because they have the same network and the same
    ranks.
    """

    trainer: Trainer
    # the variables of any of them before round 1; the shared ones are the server's, for all kinds
    initial: Variables
    prefix: str = ""  # of their leaves among the personal ones of all kinds
    network: int = 0  # its number in ``model.mix``

    @property
    def algorithm(self) -> Algorithm:
        """The method as these clients have it."""
        return self.trainer.algorithm

    @property
    def local_initial(self) -> Variables:
        """``first`` with the shared variables as such a client gets them."""
        return self.initial._replace(shared=self.algorithm.download(self.initial.shared))

    @property
    def untrained_upload(self) -> Tree:
        """What such a client would send without training."""
        local_initial = self.local_initial
        return self.algorithm.upload(local_initial, local_initial)

    @property
    def untrained_term(self) -> Tree:
        """What that would stand for in the mean."""
        return self.algorithm.expand(self.untrained_upload, self.initial.shared, 1)

    def download_nbytes(self, shared: Tree) -> int:
        """Bytes that such a client would receive of the server's variables."""
        return estimate_nbytes(
            int(self.algorithm.download_numel(shared)), [Layout.of(self.algorithm.download(shared))]
        )


class Journal(Protocol):
    """What a round needs of a ``resilience.replicas.Journal``."""

    def save_undo(self, client: int) -> None: ...

    def progress(self) -> None: ...

    def wait(self) -> None: ...

    def commit(self) -> None: ...

    def begin_round(self, state: "State") -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """Everything that does not change from round to round."""

    algorithm: Algorithm
    kinds: tuple[ClientType, ...]
    kind_of: tuple[int, ...]  # of each client
    comm: Comm
    groups: tuple[Group, ...]  # each of one kind
    costs: tuple[float, ...]  # of each group, FLOP or any unit
    rank_of_group: tuple[int, ...]  # rank of each group
    throughput: "Throughput"
    group_size: int  # clients that compute together, about as many as a group has in a cohort
    weight_N: tuple[int, ...]  # what a client's upload counts in the mean
    sizes: tuple[int, ...]  # training samples of each client
    seed: int
    participation: float
    reduce: str
    upload_layout: Layout  # of what an upload stands for in the mean
    gather_uploads: bool = False  # whether uploads travel as they are, not as that
    mixing: Mixing | None = None  # how per-client mixes are exchanged; None: the method has none
    # this run with what its clients hold in each task; empty: there are none
    task_runs: tuple["Run", ...] = ()
    task_rounds: int = 1  # of each task; the last one stays
    privacy: Privacy = Privacy()
    # whether a client whose numbers are not finite is left out of its round; else it ends the run
    skip_nonfinite: bool = False
    # whether those who are judged in a round are its cohort; else everybody is
    evaluate_cohort_only: bool = False
    personal_rows: RowStorage = MemoryRows()  # where personal leaves live
    journal: Journal | None = None  # of a run that survives the loss of a rank
    clock: Stopwatch = field(default_factory=Stopwatch)  # of this rank

    @property
    def trainer(self) -> Trainer:
        """The trainer of the first kind; the server knows its network."""
        return self.kinds[0].trainer

    @cached_property
    def local_clients(self) -> tuple[int, ...]:
        """The clients of this rank, kind after kind."""
        return self.clients_of(self.comm.rank)

    @cached_property
    def flops(self) -> tuple[Flops, ...]:
        """The floating-point operations of each kind of client."""
        return tuple(
            Flops(kind.trainer, kind.local_initial, self.comm.heartbeat.beat, self.comm.rank == 0)
            for kind in self.kinds
        )

    @cached_property
    def drift_slices(self) -> tuple[slice, ...]:
        """Where an upload holds parameters whose drift is measured."""
        role, names = (
            self.trainer.model.role,
            self.upload_layout.common_leaves(self.kinds[0].initial.shared),
        )
        parameters = [n for n in names if role(n) not in (None, "stats")] or [
            n for n in names if role(n) != "stats"
        ]
        return self.upload_layout.leaf_slices(parameters)

    @cached_property
    def local_clients_by_kind(self) -> tuple[tuple[int, ...], ...]:
        """The clients of this rank by kind, in the order of the rows of their personal leaves."""
        return tuple(
            tuple(c for c in self.local_clients if self.kind_of[c] == kind)
            for kind in range(len(self.kinds))
        )

    @cached_property
    def rank_of_client(self) -> dict[int, int]:
        """The rank that hosts each client."""
        return {
            client: rank
            for group, rank in zip(self.groups, self.rank_of_group, strict=True)
            for client in group
        }

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layout of the upload of each kind of client."""
        return tuple(Layout.of(kind.untrained_upload) for kind in self.kinds)

    @cached_property
    def row_of_client(self) -> dict[int, int]:
        """The row of the personal leaves of each client of this rank."""
        return {
            client: row
            for clients in self.local_clients_by_kind
            for row, client in enumerate(clients)
        }

    def local_groups(self) -> Iterator[Group]:
        """The groups that this rank hosts."""
        return (
            group
            for group, rank in zip(self.groups, self.rank_of_group, strict=True)
            if rank == self.comm.rank
        )

    def clients_of(self, rank: int) -> tuple[int, ...]:
        """The clients that a rank hosts, kind after kind."""
        return tuple(
            c
            for group, group_rank in zip(self.groups, self.rank_of_group, strict=True)
            if group_rank == rank
            for c in group
        )

    def with_fields(self, **fields: Any) -> "Run":
        """This run, and its tasks, with other fields."""
        return replace(
            self, **fields, task_runs=tuple(replace(part, **fields) for part in self.task_runs)
        )

    def for_round(self, round_: int) -> "Run":
        """This run with the sizes, weights and feeds of the task of a round (from 0)."""
        return (
            self.task_runs[min(round_ // self.task_rounds, len(self.task_runs) - 1)]
            if self.task_runs
            else self
        )

    def sample_cohort(self, round_: int) -> frozenset[int]:
        """The cohort of a round, sampled from the clients that hold data.

        It is a pure function of the seed, so no rank has to send it.
        """
        sizes = self.for_round(round_).sizes
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

    def cohort_weight(self, chosen: frozenset[int]) -> float:
        """Total weight of a cohort's uploads; under differential privacy its expectation."""
        if self.privacy.is_differential:
            return (
                self.participation * len(self.sizes)
                if self.privacy.samples_poisson
                else len(self.sample_cohort(0))
            )
        return sum(self.weight_N[client] for client in chosen)

    def epsilon(self, rounds: int) -> float:
        """The epsilon that so many rounds cost."""
        return epsilon(
            self.privacy, self.participation, len(self.sample_cohort(0)), len(self.sizes), rounds
        )

    def untrained_contribution(self, shared: Tree) -> Tensor:
        """The reference [D] of clipped updates: the upload of any client without training."""
        kind = self.kinds[0]
        personal = tmap(lambda v: v.to(self.trainer.device), kind.initial.personal)
        return untrained_contribution(kind.algorithm, Variables(shared, personal), shared)

    @property
    def number_bytes(self) -> int:
        """Bytes of each number of the message that is summed."""
        return {"exact": 16, "fast": self.upload_layout.dtype.itemsize}[self.reduce]

    def allocate_personal(self) -> Tree:
        """Memory for the personal leaves of this rank's clients, not initialized."""
        leaves: Tree = {}
        for kind, clients in zip(self.kinds, self.local_clients_by_kind, strict=True):
            leaves |= {
                kind.prefix + n: self.personal_rows.allocate(len(clients), v)
                for n, v in kind.initial.personal.items()
            }
        return leaves

    def split_into_stacks(self, clients: Iterable[int], at_least: int = 1) -> list[Sequence[int]]:
        """Clients of a group, those with the most samples first, in equal parts.

        A part has at most ``group_size`` clients, or ``at_least`` where that is more.
        """
        # clients of equal size stay in the order of the group
        order = sorted(clients, key=lambda client: -self.sizes[client])
        return equal_parts(order, max(self.group_size, at_least))


class Throughput:
    """Training time of this rank's clients, by kind."""

    def __init__(self, kinds: int) -> None:
        self.totals = np.zeros((2, kinds))  # seconds; samples

    def add(self, kind: int, seconds: float, samples: int) -> None:
        self.totals[:, kind] += seconds, samples


class State(NamedTuple):
    """Everything that changes from round to round, and so all that a checkpoint holds."""

    round: int  # rounds done
    server: Tree  # the server's own, equal on all ranks
    shared: Tree  # equal on all ranks
    # Of each kind [its hosted clients, ...], rows as in ``Run.local_clients_by_kind``. Owned by the
    # rank, and written to.
    personal: Tree
