"""Which clients exchange with which, without a server, and with which weights.

A topology is a graph of clients. Its mixing matrix W [N, N] is symmetric and doubly stochastic.
Unless a file gives W itself, it has the Metropolis weights (Xiao, Boyd and Lall, "A Scheme for
Robust Distributed Sensor Fusion Based on Average Consensus", IPSN 2005) of the degrees d_i:

    W_ij = 1 / (1 + max(d_i, d_j)) for neighbours i and j,   W_ii = 1 - sum_(j != i) W_ij
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from itertools import combinations

import numpy as np
import torch

from ..core.bounds import bounded
from ..core.paths import check_path, expand_home
from ..core.seeds import rng

_TOLERANCE = 1e-6  # of the sums and of the symmetry of a matrix that a file gives
_MIN_GAP = 1e-9  # spectral gaps below it are rounding
Edges = np.ndarray  # [E, 2] clients, each pair in any order


@dataclass(frozen=True, eq=False)
class MixingMatrix:
    """W of a topology, [N, N] float64."""

    weights: np.ndarray

    @cached_property
    def neighbours(self) -> tuple[frozenset[int], ...]:
        """The neighbours of each client, without itself."""
        return tuple(
            frozenset(np.flatnonzero(row).tolist()) - {client}
            for client, row in enumerate(self.weights)
        )

    @cached_property
    def spectral_gap(self) -> float:
        """1 - max(|lambda_2|, |lambda_N|), for the eigenvalues lambda_1 = 1 >= ... >= lambda_N.

        One exchange shrinks the distance of the clients from their mean by 1 minus this, or more.
        """
        eigenvalues = np.linalg.eigvalsh(self.weights)
        return float(1 - max(abs(eigenvalues[0]), abs(eigenvalues[-2])))

    def senders(self, client: int, members: Set[int]) -> list[int]:
        """``client`` and its neighbours among ``members``, in ascending order."""
        return sorted((self.neighbours[client] & members) | {client})

    def row(self, client: int, members: Set[int]) -> dict[int, float]:
        """{sender: its weight} for a client of the cohort ``members``, in ascending order.

        The weights of absent neighbours go to the client itself. So W of a cohort is symmetric and
        doubly stochastic, and absent clients keep what they have.
        """
        senders = self.senders(client, members)
        row = {sender: float(self.weights[client, sender]) for sender in senders}
        absent = sorted(self.neighbours[client] - {*senders})
        row[client] += sum(float(self.weights[client, other]) for other in absent)
        return row

    def is_connected(self, members: Iterable[int]) -> bool:
        """Whether every one of ``members`` reaches every other over ``members`` alone."""
        remaining = {*members}
        pending = [remaining.pop()] if remaining else []
        while pending:
            reached = self.neighbours[pending.pop()] & remaining
            remaining -= reached
            pending += reached
        return not remaining

    def digest(self) -> str:
        """A hex hash of the weights."""
        return hashlib.blake2b(self.weights.astype("<f8").tobytes(), digest_size=16).hexdigest()


class Topology(ABC):
    """A rule that says which clients are neighbours; its fields are its settings."""

    @abstractmethod
    def edges(self, clients: int) -> Edges:
        """The pairs of neighbours. Raises ValueError that begins "field = value" or "name = "."""

    def matrix(self, clients: int) -> MixingMatrix:
        """W for so many clients. Raises ValueError if there is none."""
        return MixingMatrix(metropolis_weights(self.edges(clients), clients))


@dataclass(frozen=True)
class Ring(Topology):
    """Client k has the neighbours k - 1 and k + 1, modulo the number of clients."""

    def edges(self, clients: int) -> Edges:
        return np.array([(k, (k + 1) % clients) for k in range(clients)])


@dataclass(frozen=True)
class Torus(Topology):
    """A grid, as square as possible, whose opposite sides are joined; clients row by row."""

    def edges(self, clients: int) -> Edges:
        rows = max(n for n in range(1, int(clients**0.5) + 1) if clients % n == 0)
        if rows == 1:
            raise ValueError(
                f"name = torus: {clients} clients form no grid with two sides of at least 2; "
                "choose another number in data.partition.clients, or ring"
            )
        grid = np.arange(clients).reshape(rows, -1)
        shifted = [np.roll(grid, -1, axis) for axis in (0, 1)]
        return np.concatenate([np.stack([grid, to], -1).reshape(-1, 2) for to in shifted])


@dataclass(frozen=True)
class Complete(Topology):
    """All clients are neighbours."""

    def edges(self, clients: int) -> Edges:
        return np.array([*combinations(range(clients), 2)]).reshape(-1, 2)


@dataclass(frozen=True)
class Random(Topology):
    """Each pair of clients is an edge with ``probability``, independently (Erdos and Renyi)."""

    probability: float
    seed: int = 1

    def __post_init__(self) -> None:
        bounded(self, probability="(0, 1]", seed="[0, inf)")

    def edges(self, clients: int) -> Edges:
        draws = torch.rand(
            clients, clients, generator=rng(self.seed, "topology"), dtype=torch.float64
        )
        return np.argwhere(np.triu(draws.numpy() < self.probability, 1))


@dataclass(frozen=True)
class File(Topology):
    """A text file of numbers with blanks or commas between them, # before a comment.

    Lines of two clients, counted from 0, are edges. N lines of N numbers are W itself.
    """

    path: str

    def __post_init__(self) -> None:
        check_path("path", self.path)

    def edges(self, clients: int) -> Edges:
        table = self._table()
        pairs = table.astype(np.int64)
        if (pairs != table).any() or pairs.min() < 0 or pairs.max() >= clients:
            raise ValueError(
                f"path = {self.path}: an edge must be two of the clients 0 to {clients - 1}"
            )
        if loops := pairs[pairs[:, 0] == pairs[:, 1], 0].tolist():
            raise ValueError(f"path = {self.path}: client {loops[0]} is its own neighbour")
        return pairs

    def matrix(self, clients: int) -> MixingMatrix:
        table = self._table()
        if table.shape == (clients, clients):
            return MixingMatrix(self._check_weights(table))
        if table.shape[1] == 2:
            return super().matrix(clients)
        raise ValueError(
            f"path = {self.path}: has {table.shape[0]} lines of {table.shape[1]} numbers; it must "
            f"have two clients a line, or {clients} lines of {clients} weights, for "
            f"data.partition.clients is {clients}"
        )

    def _table(self) -> np.ndarray:
        """The numbers of the file, [lines, numbers of a line]."""
        try:
            text = expand_home(self.path).read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a file without numbers
                table = np.loadtxt(StringIO(text.replace(",", " ")), ndmin=2)
        except OSError as error:
            raise ValueError(f"path = {self.path}: cannot be read: {error.strerror}") from None
        except ValueError:
            table = np.zeros((0, 0))
        if not table.size or not np.isfinite(table).all():
            raise ValueError(
                f"path = {self.path}: must have equally many numbers on every line, with blanks or "
                "commas between them"
            )
        return table

    def _check_weights(self, table: np.ndarray) -> np.ndarray:
        """W as ``table`` gives it; what its numbers lack by rounding goes to the diagonal."""
        if (table < 0).any():
            client = int(np.argwhere(table < 0)[0, 0])
            raise ValueError(f"path = {self.path}: line {client + 1} has a negative weight")
        asymmetry = np.abs(table - table.T)
        if asymmetry.max() > _TOLERANCE:
            i, j = np.unravel_index(asymmetry.argmax(), asymmetry.shape)
            raise ValueError(
                f"path = {self.path}: is not symmetric: line {i + 1} gives client {j} the weight "
                f"{table[i, j]:g}, and line {j + 1} gives client {i} {table[j, i]:g}"
            )
        errors = np.abs(table.sum(1) - 1)
        if errors.max() > _TOLERANCE:
            line = int(errors.argmax())
            raise ValueError(
                f"path = {self.path}: is not doubly stochastic: the weights of line {line + 1} sum "
                f"to {table[line].sum():g}, must be 1"
            )
        return _fill_diagonal((table + table.T) / 2)


TOPOLOGIES: dict[str, type[Topology]] = {
    "ring": Ring,
    "torus": Torus,
    "complete": Complete,
    "random": Random,
    "file": File,
}


def topology_name(topology: Topology) -> str:
    """The name of this topology in a config."""
    return next(name for name, cls in TOPOLOGIES.items() if type(topology) is cls)


def metropolis_weights(edges: Edges, clients: int) -> np.ndarray:
    """W [N, N] of a graph."""
    is_edge = np.zeros((clients, clients), bool)
    is_edge[edges[:, 0], edges[:, 1]] = is_edge[edges[:, 1], edges[:, 0]] = True
    np.fill_diagonal(is_edge, False)  # of a ring of one
    degrees = is_edge.sum(1)
    return _fill_diagonal(is_edge / (1.0 + np.maximum(degrees[:, None], degrees)))


def _fill_diagonal(weights: np.ndarray) -> np.ndarray:
    """``weights`` with a diagonal that makes every row sum to 1."""
    weights = weights.copy()
    np.fill_diagonal(weights, 0)
    np.fill_diagonal(weights, np.maximum(1 - weights.sum(1), 0))
    return weights


def mixing_matrix(topology: Topology, clients: int) -> MixingMatrix:
    """W of so many clients, which an exchange after the other takes to their mean.

    Raises ValueError that begins "field = value" otherwise.
    """
    name = topology_name(topology)
    if clients < 2:
        raise ValueError(f"name = {name}: needs at least 2 clients; leave topology out")
    matrix = topology.matrix(clients)
    setting = f"path = {topology.path}" if isinstance(topology, File) else f"name = {name}"
    if isinstance(topology, Random):
        setting = f"probability = {topology.probability:g}"
    if not matrix.is_connected(range(clients)):
        way_out = "add edges"
        if isinstance(topology, Random):
            way_out = f"raise it, or choose another seed than {topology.seed}"
        raise ValueError(
            f"{setting}: the graph of the {clients} clients is not connected, so they never agree; "
            f"{way_out}"
        )
    if matrix.spectral_gap < _MIN_GAP:
        raise ValueError(
            f"{setting}: has the spectral gap 0, so the clients swap their models and never agree; "
            "give them weights of their own"
        )
    return matrix
