"""Which samples each client holds: the data splits of the literature, each sure to end.

A kind says how many samples of which pool every client wants; ``Partition.split`` draws them. A
pool is a class, or all samples where labels do not matter. One ``numpy.random.RandomState(seed)``
serves both, as in the official FedDecomp code; numpy has frozen its stream.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.random import RandomState

from ..core.bounds import bounded
from .apportion import dealt, limited, rounded, topped_up


@dataclass(frozen=True, eq=False)
class Split:
    """Who holds what. Indices keep the order in which they were drawn."""

    train: tuple[np.ndarray, ...]  # client -> [n_k] int64 indices into the training set
    test: tuple[np.ndarray, ...]  # client -> [m_k] int64 indices into the test set
    train_counts: np.ndarray  # [N, classes] samples
    test_counts: np.ndarray  # [N, classes] samples

    def digest(self) -> str:
        """SHA-256 in hexadecimal over every client's sizes and indices; equal splits, equal
        digests.
        """
        sha = hashlib.sha256()
        for rows in (*self.train, *self.test):
            sha.update(np.append(len(rows), rows).astype("<i8").tobytes())
        return sha.hexdigest()


class Side(NamedTuple):
    """What there is to draw from, for training or for testing."""

    name: str  # "train" or "test", the key of its size
    pools: list[np.ndarray]  # pool -> indices
    each: int  # samples per client
    repeat: bool  # may one draw hold a sample twice?

    @property
    def sizes(self) -> list[int]:
        return [len(pool) for pool in self.pools]


_ALLOWED = {
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
    """A client's training and test samples come from the same mix of labels, in every kind.

    With ``overlap`` clients draw independently of each other and may hold the same sample; without
    it each sample has one owner at most. Nobody holds a sample twice, with one exception:
    overlapping test draws repeat when some pool holds fewer than ``test`` samples, as in the
    official code for Tiny ImageNet (50 test images per class, 100 per client).
    """

    clients: int = 40
    train: int = 500  # samples per client; 0: an equal share of all
    test: int = 100  # samples per client; 0: an equal share of all
    seed: int = 1
    overlap: bool = False
    by_class: ClassVar[bool] = True  # one pool per class, or one for all

    def __post_init__(self) -> None:
        bounded(
            self, **{field: allowed for field, allowed in _ALLOWED.items() if hasattr(self, field)}
        )

    @abstractmethod
    def wants(
        self, rng: RandomState, train: Side, test: Side
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield (client, pool, training samples, test samples) in the order in which they are
        drawn.
        """

    def split(
        self,
        train_y: np.ndarray,
        test_y: np.ndarray,
        classes: int,
        owners: Sequence[np.ndarray] | None = None,
    ) -> Split:
        """Deal the samples whose labels are ``train_y`` [M] and ``test_y`` [M']; ``owners``: their
        clients, where the data set comes with a split, for the kind ``given`` alone.

        Raises ValueError when the samples do not suffice or a client would train or test on none.
        """
        # so overlap does not change the mixes
        rng, shuffle = RandomState(self.seed), RandomState([self.seed, 1])
        sides = (
            self._side("train", train_y, classes, shuffle),
            self._side("test", test_y, classes, shuffle),
        )
        held = [[[] for _ in range(self.clients)] for _ in sides]
        for client, pool, *numbers in self.wants(rng, *sides):
            for side, mine, n in zip(sides, held, numbers, strict=True):
                mine[client].append(self._draw(rng, side, client, pool, n))
        train, test = (tuple(map(np.concatenate, mine)) for mine in held)
        self._refuse_empty("train", train)
        self._refuse_empty("test", test)
        return Split(train, test, _counts(train_y, train, classes), _counts(test_y, test, classes))

    def _refuse_empty(self, name: str, held: tuple[np.ndarray, ...]) -> None:
        none = [client for client, rows in enumerate(held) if not len(rows)]
        if none:
            way_out = f"raise {name} or lower clients" if getattr(self, name) else "lower clients"
            raise ValueError(
                f"data.partition.{name} = {getattr(self, name)}: {len(none)} of {self.clients} "
                f"clients (first: {none[0]}) would hold no {name} sample; {way_out}"
            )

    def _side(self, name: str, y: np.ndarray, classes: int, shuffle: RandomState) -> Side:
        each = getattr(self, name)
        groups = [y == c for c in range(classes)] if self.by_class else [y >= 0]
        pools = [np.flatnonzero(group) for group in groups]
        if not self.overlap:
            pools = [shuffle.permutation(pool) for pool in pools]
        repeat = self.overlap and name == "test" and min(map(len, pools)) < each
        return Side(name, pools, each or len(y) // self.clients, repeat)

    def _draw(self, rng: RandomState, side: Side, client: int, pool: int, n: int) -> np.ndarray:
        """``n`` indices of a pool; without overlap they leave it."""
        have = side.pools[pool]
        if n > len(have) and not (side.repeat and len(have)):
            which = f" of class {pool}" if self.by_class else ""
            way_out = "" if self.overlap else " or clients, or set overlap to true"
            raise ValueError(
                f"data.partition.{side.name} = {getattr(self, side.name)}: client {client} wants "
                f"{n} {side.name} samples{which}, and there are "
                f"{len(have)}{'' if self.overlap else ' left'}; lower {side.name}{way_out}"
            )
        if self.overlap:
            return rng.choice(have, n, replace=side.repeat)
        side.pools[pool] = have[n:]
        return have[:n]


@dataclass(frozen=True)
class DirichletClient(Partition):
    """Each client has a mix of classes q ~ Dirichlet(alpha): the official FedDecomp rule.

    The mixes of all clients are drawn first. Then, client by client and class by class, int(train *
    q + 0.5) samples, cut to what remains of ``train``, and the same for ``test``: totals are at
    most ``train`` and ``test``, and a few samples less where rounding fell short. Same seed, same
    samples as the official code.
    """

    overlap: bool = True
    alpha: float = 0.1

    def wants(self, rng, train, test):
        mixes = _dirichlet(rng, self.alpha, len(train.pools), self.clients)
        for client, mix in enumerate(mixes):
            numbers = zip(rounded(train.each, mix), rounded(test.each, mix), strict=True)
            for pool, (n, m) in enumerate(numbers):
                yield client, pool, n, m


@dataclass(frozen=True)
class DirichletClass(Partition):
    """Each class is dealt to the clients in proportions p ~ Dirichlet(alpha) (Hsu et al. 2019;
    NIID-bench).

    All samples are dealt; ``train`` and ``test`` above 0 are upper limits, reached by thinning a
    client's classes in proportion. NIID-bench draws again until every client holds ten samples;
    here clients short of ``minimum`` training samples (of one test sample) are given some by the
    best supplied, of the classes they hold the largest share of.
    """

    train: int = 0  # at most so many samples per client; 0: no limit
    test: int = 0  # at most so many samples per client; 0: no limit
    alpha: float = 0.1
    minimum: int = 10  # training samples

    def wants(self, rng, train, test):
        shares = _dirichlet(rng, self.alpha, self.clients, len(train.pools)).T  # [N, classes]
        n = topped_up(dealt(train.sizes, shares), self.minimum, shares)
        m = topped_up(dealt(test.sizes, shares), 1, n)
        yield from _entries(limited(n, self.train), limited(m, self.test))


@dataclass(frozen=True)
class Pathological(Partition):
    """Each client holds ``classes_per_client`` classes, int(train / classes_per_client) samples of
    each.

    With overlap (the official FedDecomp rule, same draws for the same seed) the classes are a
    random choice per client; without it they go round in turn, so that every class is wanted
    equally often.
    """

    overlap: bool = True
    classes_per_client: int = 2

    def wants(self, rng, train, test):
        each, classes = self.classes_per_client, len(train.pools)
        if each > classes:
            raise ValueError(
                f"data.partition.classes_per_client = {each}: the data set has {classes} classes"
            )
        for client in range(self.clients):
            turn = [(client * each + i) % classes for i in range(each)]
            for pool in rng.choice(classes, each, replace=False) if self.overlap else turn:
                yield client, int(pool), train.each // each, test.each // each


@dataclass(frozen=True)
class Shares(Partition):
    """Each client shares ``classes_per_client`` classes with a few others, in unequal parts
    (pFedLoRA's authors).

    Each class is for as many clients as all others; its samples are dealt in proportions U(0.4,
    0.6), normalised, the same in training and test: int(n p). Clients pick their classes one at a
    time, among those with most places left. The share ``validation`` of all training samples is
    held back from everybody; ``train`` and ``test`` above 0 are upper limits, reached as in
    ``DirichletClass``.

    Where places do not come out even, the authors' code fails or gives a client one class twice;
    here some classes, drawn, have one place more, and nobody picks a class again. That always
    works: places left differ by one at most, so a client that needs k classes finds k that it does
    not hold.
    """

    clients: int = 10
    train: int = 0  # at most so many samples per client; 0: no limit
    test: int = 0  # at most so many samples per client; 0: no limit
    classes_per_client: int = 2
    validation: float = 0.2

    def wants(self, rng, train, test):
        each, classes = self.classes_per_client, len(train.pools)
        if each > classes:
            raise ValueError(
                f"data.partition.classes_per_client = {each}: the data set has {classes} classes"
            )
        places, more = divmod(each * self.clients, classes)
        left = np.full(classes, places)
        if more:
            left[rng.choice(classes, more, replace=False)] += 1
        parts = [rng.uniform(0.4, 0.6, number) for number in left]
        parts = [list(part / part.sum()) for part in parts]
        mixes = np.zeros((self.clients, classes))
        for mix in mixes:
            for _ in range(each):
                open_ = np.where(mix > 0, 0, left)
                pool = rng.choice(np.flatnonzero(open_ == open_.max()))
                mix[pool] = parts[pool].pop()
                left[pool] -= 1
        n, m = ((mixes * side.sizes).astype(np.int64) for side in (train, test))
        yield from _entries(limited(n, self.train), limited(m, self.test))

    def _side(self, name, y, classes, shuffle):
        side = super()._side(name, y, classes, shuffle)
        if name == "test":
            return side
        kept = np.zeros(len(y), bool)
        kept[
            RandomState([self.seed, 2]).permutation(len(y))[: round(len(y) * (1 - self.validation))]
        ] = True
        return side._replace(pools=[pool[kept[pool]] for pool in side.pools])


@dataclass(frozen=True)
class Iid(Partition):
    """Every client draws the same number of samples, whatever their labels."""

    by_class: ClassVar[bool] = False

    def wants(self, rng, train, test):
        yield from ((client, 0, train.each, test.each) for client in range(self.clients))


@dataclass(frozen=True)
class Quantity(Partition):
    """Clients differ in size only: shares of clients * train samples ~ Dirichlet(alpha), labels
    iid.

    Clients short of ``minimum`` training samples (of one test sample) are given some by the
    largest.
    """

    alpha: float = 0.5
    minimum: int = 10  # training samples
    by_class: ClassVar[bool] = False

    def wants(self, rng, train, test):
        shares = _dirichlet(rng, self.alpha, self.clients, 1).T  # [N, 1]
        total, total_test = (
            self.clients * getattr(self, s.name) or s.sizes[0] for s in (train, test)
        )
        n = topped_up(dealt([total], shares), self.minimum, shares)
        yield from _entries(n, topped_up(dealt([total_test], shares), 1, shares))


@dataclass(frozen=True)
class Given(Partition):
    """Each client holds what the data set says it does, in that order; nothing is drawn, so the
    seed does not matter.
    """

    train: int = 0  # at most so many samples per client, the first; 0: all
    test: int = 0  # at most so many samples per client, the first; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap:
            raise ValueError("overlap = true: a given split is taken as it is; leave it out")

    def wants(self, rng, train, test):
        raise AssertionError("nothing is drawn")

    def split(self, train_y, test_y, classes, owners=None):
        if owners is None:
            raise ValueError(
                "data.partition.kind = given: this data set has no split; choose another kind, or "
                "data.dataset = pfllib"
            )
        if (there := 1 + max(int(side.max()) for side in owners)) != self.clients:
            raise ValueError(
                f"data.partition.clients = {self.clients}: the given split has {there} clients; "
                "say so"
            )
        rows = [[np.flatnonzero(side == client) for client in range(there)] for side in owners]
        train, test = (
            tuple(mine[: most or None] for mine in side)
            for side, most in zip(rows, (self.train, self.test), strict=True)
        )
        self._refuse_empty("train", train)
        self._refuse_empty("test", test)
        return Split(train, test, _counts(train_y, train, classes), _counts(test_y, test, classes))


KINDS: dict[str, type[Partition]] = {
    "dirichlet_client": DirichletClient,
    "dirichlet_class": DirichletClass,
    "pathological": Pathological,
    "shares": Shares,
    "iid": Iid,
    "quantity": Quantity,
    "given": Given,
}


def _counts(y: np.ndarray, held: tuple[np.ndarray, ...], classes: int) -> np.ndarray:
    """How many samples of each class each client holds: [N, classes]."""
    return np.stack([np.bincount(y[rows], minlength=classes) for rows in held])


def _dirichlet(rng: RandomState, alpha: float, length: int, number: int) -> np.ndarray:
    """``number`` draws from the symmetric Dirichlet distribution: [number, length], rows add to 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = rng.dirichlet(np.repeat(alpha, length), number)
    if not np.isfinite(draws).all():
        raise ValueError(
            f"data.partition.alpha = {alpha}: a Dirichlet draw underflowed to zero; use at least "
            "0.01"
        )
    return draws


def _entries(n: np.ndarray, m: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """The matrices of training and test counts [N, pools] as the entries that ``wants`` yields."""
    for (client, pool), wanted in np.ndenumerate(n):
        yield client, pool, int(wanted), int(m[client, pool])
