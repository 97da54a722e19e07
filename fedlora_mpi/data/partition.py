"""Split a data set among clients, by the rules of the literature; every rule terminates.

A subclass of ``Partition`` says how many samples of which pool every client gets;
``Partition.split`` draws them. A pool is a class, or all samples if labels do not matter. One
``numpy.random.RandomState(seed)`` serves both steps, as in the official FedDecomp code; numpy
guarantees its stream.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.random import RandomState

from ..core.bounds import bounded
from .apportion import ensure_minimum, limit_rows, round_shares, split_pools

Rows = tuple[np.ndarray, ...]  # client -> [n_k] int64 indices into the training or test set


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of every client. Indices keep the order in which they were drawn."""

    train: Rows
    test: Rows
    train_counts: np.ndarray  # [N, classes] samples
    test_counts: np.ndarray  # [N, classes] samples

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of every client's sizes and indices."""
        sha = hashlib.sha256()
        for rows in (*self.train, *self.test):
            sha.update(np.append(len(rows), rows).astype("<i8").tobytes())
        return sha.hexdigest()


class SamplePools(NamedTuple):
    """The samples of the training or of the test set, in pools from which clients draw."""

    name: str  # "train" or "test", the config key of the number of samples per client
    pools: list[np.ndarray]  # pool -> indices
    per_client: int  # samples per client
    with_replacement: bool  # whether one draw may hold a sample twice

    @property
    def sizes(self) -> list[int]:
        return [len(pool) for pool in self.pools]


_BOUNDS = {
    "clients": "[1, 10000000]",
    "train": "[0, inf)",
    "test": "[0, inf)",
    "seed": f"[0, {2**32 - 1}]",
    "alpha": "(0, inf)",
    "minimum": "[1, inf)",
    "classes_per_client": "[1, inf)",
    "validation": "[0, 1)",
}


@dataclass(frozen=True)
class Partition(ABC):
    """A rule that splits a data set among clients.

    In every rule that draws, the training and test samples of a client have the same mix of labels.
    With ``overlap``, clients draw independently and may hold the same sample; without it, each
    sample has at most one owner. No client holds a sample twice, with one exception: with
    ``overlap``, test draws repeat samples if some pool holds fewer than ``test`` samples, as in the
    official code for Tiny ImageNet (50 test images per class, 100 per client).
    """

    clients: int = 40
    train: int = 500  # samples per client; 0: an equal share of all
    test: int = 100  # samples per client; 0: an equal share of all
    seed: int = 1
    overlap: bool = False
    by_class: ClassVar[bool] = True  # one pool per class; False: one pool for all samples

    def __post_init__(self) -> None:
        bounded(
            self, **{field: allowed for field, allowed in _BOUNDS.items() if hasattr(self, field)}
        )

    @abstractmethod
    def allocations(
        self, rng: RandomState, train: SamplePools, test: SamplePools
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield (client, pool, number of training samples, number of test samples).

        Samples are drawn in the order of these entries.
        """

    def split(
        self,
        train_y: np.ndarray,
        test_y: np.ndarray,
        classes: int,
        owners: Sequence[np.ndarray] | None = None,
    ) -> Split:
        """Return the split of the samples whose labels are ``train_y`` [M] and ``test_y`` [M'].

        ``owners`` are the clients of the samples if the data set comes with a split; only the kind
        ``given`` uses them. Raises ValueError if the samples do not suffice or if a client would
        have no training or no test sample.
        """
        # A generator of its own shuffles the pools, so overlap does not change the mixes.
        rng, shuffle = RandomState(self.seed), RandomState([self.seed, 1])
        sides = (
            self._make_pools("train", train_y, classes, shuffle),
            self._make_pools("test", test_y, classes, shuffle),
        )
        rows_by_side: list[list[list[np.ndarray]]] = [
            [[] for _ in range(self.clients)] for _ in sides
        ]
        for client, pool, *numbers in self.allocations(rng, *sides):
            for side, client_rows, n in zip(sides, rows_by_side, numbers, strict=True):
                client_rows[client].append(self._draw(rng, side, client, pool, n))
        train, test = (tuple(map(np.concatenate, mine)) for mine in rows_by_side)
        return self._checked_split(train, test, train_y, test_y, classes)

    def _checked_split(
        self, train: Rows, test: Rows, train_y: np.ndarray, test_y: np.ndarray, classes: int
    ) -> Split:
        """Return the split of these rows, one array per client; raise ValueError if one is empty.

        The class counts come from the labels ``train_y`` [M] and ``test_y`` [M'].
        """
        self._check_nonempty("train", train)
        self._check_nonempty("test", test)
        train_counts, test_counts = (
            _class_counts(y, rows, classes) for y, rows in ((train_y, train), (test_y, test))
        )
        return Split(train, test, train_counts, test_counts)

    def _check_nonempty(self, name: str, rows_by_client: Rows) -> None:
        empty_clients = [client for client, rows in enumerate(rows_by_client) if not len(rows)]
        if empty_clients:
            way_out = f"raise {name} or lower clients" if getattr(self, name) else "lower clients"
            raise ValueError(
                f"data.partition.{name} = {getattr(self, name)}: {len(empty_clients)} of "
                f"{self.clients} clients (first: {empty_clients[0]}) would hold no {name} sample; "
                f"{way_out}"
            )

    def _make_pools(
        self, name: str, y: np.ndarray, classes: int, shuffle: RandomState
    ) -> SamplePools:
        per_client = getattr(self, name)
        groups = [y == c for c in range(classes)] if self.by_class else [y >= 0]
        pools = [np.flatnonzero(group) for group in groups]
        if not self.overlap:
            pools = [shuffle.permutation(pool) for pool in pools]
        repeat = self.overlap and name == "test" and min(map(len, pools)) < per_client
        return SamplePools(name, pools, per_client or len(y) // self.clients, repeat)

    def _draw(
        self, rng: RandomState, side: SamplePools, client: int, pool: int, n: int
    ) -> np.ndarray:
        """Return ``n`` indices of a pool; without overlap they are removed from it.

        Raises ValueError if the pool has too few.
        """
        available = side.pools[pool]
        if n > len(available) and not (side.with_replacement and len(available)):
            which = f" of class {pool}" if self.by_class else ""
            way_out = "" if self.overlap else " or clients, or set overlap to true"
            raise ValueError(
                f"data.partition.{side.name} = {getattr(self, side.name)}: client {client} wants "
                f"{n} {side.name} samples{which}, and there are "
                f"{len(available)}{'' if self.overlap else ' left'}; lower {side.name}{way_out}"
            )
        if self.overlap:
            return rng.choice(available, n, replace=side.with_replacement)
        side.pools[pool] = available[n:]
        return available[:n]


@dataclass(frozen=True)
class DirichletClient(Partition):
    """Each client has a mix of classes q ~ Dirichlet(alpha): the official FedDecomp rule.

    The mixes of all clients are drawn first. Then each client draws, class by class, int(train * q
    + 0.5) samples, limited to what remains of ``train``, and the same for ``test``. A client has at
    most ``train`` and ``test`` samples; rounding can leave it a few less. The same seed gives the
    same samples as the official code.
    """

    overlap: bool = True
    alpha: float = 0.1

    def allocations(self, rng, train, test):
        mixes = _draw_dirichlet(rng, self.alpha, len(train.pools), self.clients)
        for client, mix in enumerate(mixes):
            numbers = zip(
                round_shares(train.per_client, mix), round_shares(test.per_client, mix), strict=True
            )
            for pool, (n, m) in enumerate(numbers):
                yield client, pool, n, m


@dataclass(frozen=True)
class DirichletClass(Partition):
    """Each class is split among the clients in proportions p ~ Dirichlet(alpha).

    Source: Hsu et al. 2019; NIID-bench. All samples are used; ``train`` and ``test`` above 0 are
    upper limits, to which the classes of a client are reduced in proportion. NIID-bench draws again
    until every client holds ten samples. Here a client with fewer than ``minimum`` training samples
    (or without a test sample) receives samples from the clients that hold the most, first of the
    classes of which it has the largest share.
    """

    train: int = 0  # upper limit of samples per client; 0: no limit
    test: int = 0  # upper limit of samples per client; 0: no limit
    alpha: float = 0.1
    minimum: int = 10  # training samples per client

    def allocations(self, rng, train, test):
        shares = _draw_dirichlet(rng, self.alpha, self.clients, len(train.pools)).T  # [N, classes]
        n = ensure_minimum(split_pools(train.sizes, shares), self.minimum, shares)
        m = ensure_minimum(split_pools(test.sizes, shares), 1, n)
        yield from _iter_allocations(limit_rows(n, self.train), limit_rows(m, self.test))


@dataclass(frozen=True)
class Pathological(Partition):
    """Each client holds ``classes_per_client`` classes, with equally many samples of each.

    These are int(train / classes_per_client) training samples, and the same for ``test``.

    With overlap, the classes are a random choice per client. This is the official FedDecomp rule;
    the same seed gives the same draws. Without overlap, classes are assigned in turn, so that every
    class is used equally often.
    """

    overlap: bool = True
    classes_per_client: int = 2

    def allocations(self, rng, train, test):
        classes_each, classes = self.classes_per_client, len(train.pools)
        if classes_each > classes:
            raise ValueError(
                f"data.partition.classes_per_client = {classes_each}: the data set has "
                f"{classes} classes"
            )
        for client in range(self.clients):
            pools_in_turn = [(client * classes_each + i) % classes for i in range(classes_each)]
            for pool in (
                rng.choice(classes, classes_each, replace=False) if self.overlap else pools_in_turn
            ):
                yield (
                    client,
                    int(pool),
                    train.per_client // classes_each,
                    test.per_client // classes_each,
                )


@dataclass(frozen=True)
class Shares(Partition):
    """Each client shares ``classes_per_client`` classes with a few other clients, in unequal parts.

    This is the rule of pFedLoRA's authors. Each class has the same number of places for clients.
    Its n samples are split in proportions p ~ U(0.4, 0.6), normalised and the same in training and
    test: int(n p). A client picks its classes one at a time, among those with most places left. The
    fraction ``validation`` of all training samples is given to no client. ``train`` and ``test``
    above 0 are upper limits, applied as in ``DirichletClass``.

    If the places cannot be divided evenly among the classes, the authors' code fails or gives a
    client one class twice. Here some classes, drawn at random, have one place more, and no client
    picks a class twice. This always works: the numbers of places left differ by at most one, so a
    client that needs k more classes finds k that it does not hold.
    """

    clients: int = 10
    train: int = 0  # upper limit of samples per client; 0: no limit
    test: int = 0  # upper limit of samples per client; 0: no limit
    classes_per_client: int = 2
    validation: float = 0.2

    def allocations(self, rng, train, test):
        classes_each, classes = self.classes_per_client, len(train.pools)
        if classes_each > classes:
            raise ValueError(
                f"data.partition.classes_per_client = {classes_each}: the data set has "
                f"{classes} classes"
            )
        clients_per_class, extra = divmod(classes_each * self.clients, classes)
        free_places = np.full(classes, clients_per_class)
        if extra:
            free_places[rng.choice(classes, extra, replace=False)] += 1
        parts = [rng.uniform(0.4, 0.6, number) for number in free_places]
        parts = [list(part / part.sum()) for part in parts]
        mixes = np.zeros((self.clients, classes))
        for mix in mixes:
            for _ in range(classes_each):
                open_places = np.where(mix > 0, 0, free_places)
                pool = rng.choice(np.flatnonzero(open_places == open_places.max()))
                mix[pool] = parts[pool].pop()
                free_places[pool] -= 1
        n, m = ((mixes * side.sizes).astype(np.int64) for side in (train, test))
        yield from _iter_allocations(limit_rows(n, self.train), limit_rows(m, self.test))

    def _make_pools(self, name, y, classes, shuffle):
        side = super()._make_pools(name, y, classes, shuffle)
        if name == "test":
            return side
        is_training = np.zeros(len(y), bool)
        is_training[
            RandomState([self.seed, 2]).permutation(len(y))[: round(len(y) * (1 - self.validation))]
        ] = True
        return side._replace(pools=[pool[is_training[pool]] for pool in side.pools])


@dataclass(frozen=True)
class Iid(Partition):
    """Every client draws the same number of samples regardless of their labels."""

    by_class: ClassVar[bool] = False

    def allocations(self, rng, train, test):
        yield from (
            (client, 0, train.per_client, test.per_client) for client in range(self.clients)
        )


@dataclass(frozen=True)
class Quantity(Partition):
    """Clients differ only in size; their labels are iid.

    Their shares of all clients * train samples are drawn from Dirichlet(alpha). A client with fewer
    than ``minimum`` training samples (or without a test sample) receives samples from the largest
    clients.
    """

    alpha: float = 0.5
    minimum: int = 10  # training samples per client
    by_class: ClassVar[bool] = False

    def allocations(self, rng, train, test):
        shares = _draw_dirichlet(rng, self.alpha, self.clients, 1).T  # [N, 1]
        total, total_test = (
            self.clients * getattr(self, s.name) or s.sizes[0] for s in (train, test)
        )
        n = ensure_minimum(split_pools([total], shares), self.minimum, shares)
        yield from _iter_allocations(
            n, ensure_minimum(split_pools([total_test], shares), 1, shares)
        )


@dataclass(frozen=True)
class GivenSplit(Partition):
    """Each client holds the samples that the data set assigns to it, in the order of the data set.

    Nothing is drawn, so the seed does not matter.
    """

    train: int = 0  # only the first so many samples of each client; 0: all
    test: int = 0  # only the first so many samples of each client; 0: all
    by_class: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap:
            raise ValueError("overlap = true: a given split is taken as it is; leave it out")

    def allocations(self, rng, train, test):
        raise AssertionError("nothing is drawn")

    def split(self, train_y, test_y, classes, owners=None):
        if owners is None:
            raise ValueError(
                "data.partition.kind = given: this data set has no split; choose another kind, "
                "data.dataset = pfllib, data with client_train and client_test, or texts with "
                "data.language.client"
            )
        if (given_clients := 1 + max(int(side.max()) for side in owners)) != self.clients:
            raise ValueError(
                f"data.partition.clients = {self.clients}: the given split has {given_clients} "
                "clients; say so"
            )
        rows = [_rows_of_clients(side, given_clients) for side in owners]
        train, test = (
            tuple(client_rows[: limit or None] for client_rows in side)
            for side, limit in zip(rows, (self.train, self.test), strict=True)
        )
        return self._checked_split(train, test, train_y, test_y, classes)

    def _check_nonempty(self, name: str, rows_by_client: Rows) -> None:
        empty_clients = [client for client, rows in enumerate(rows_by_client) if not len(rows)]
        if empty_clients:
            raise ValueError(
                f"data.partition.kind = given: {len(empty_clients)} of {self.clients} clients "
                f"(first: {empty_clients[0]}) hold no {name} sample in the given split; give them "
                "one, remove them from the data, or choose another kind"
            )


PARTITIONS: dict[str, type[Partition]] = {
    "dirichlet_client": DirichletClient,
    "dirichlet_class": DirichletClass,
    "pathological": Pathological,
    "shares": Shares,
    "iid": Iid,
    "quantity": Quantity,
    "given": GivenSplit,
}


def _rows_of_clients(owners: np.ndarray, clients: int) -> list[np.ndarray]:
    """Return the samples of each client, in the order of the data set."""
    order = np.argsort(owners, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owners, minlength=clients))[:-1])


def _class_counts(y: np.ndarray, rows_by_client: Rows, classes: int) -> np.ndarray:
    """Return how many samples of each class each client holds: [N, classes]."""
    return np.stack([np.bincount(y[rows], minlength=classes) for rows in rows_by_client])


def _draw_dirichlet(rng: RandomState, alpha: float, length: int, number: int) -> np.ndarray:
    """Return draws [number, length] of the symmetric Dirichlet distribution; rows sum to 1.

    Raises ValueError if a draw underflows to zero, as for a small ``alpha``.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = rng.dirichlet(np.repeat(alpha, length), number)
    if not np.isfinite(draws).all():
        raise ValueError(
            f"data.partition.alpha = {alpha}: a Dirichlet draw underflowed to zero; use at least "
            "0.01"
        )
    return draws


def _iter_allocations(n: np.ndarray, m: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yield training counts ``n`` and test counts ``m`` [N, pools] as ``allocations`` does."""
    for (client, pool), train_samples in np.ndenumerate(n):
        yield client, pool, int(train_samples), int(m[client, pool])
