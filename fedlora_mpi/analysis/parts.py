"""What low-rank and personal parts have learned: rank and norm by layer and client, similarity of
clients.

torch is imported where the method has low-rank factors, for their scale s.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..core.names import is_own, plain_name
from ..store.snapshot import Checkpoint, folder_of
from .run_view import RunView

T = TypeVar("T")
CLIENTS = 100  # at most so many are looked at, evenly spread over their numbers
BLOCK = 1 << 24  # numbers of a matrix [clients, coordinates] held at a time


class LowRank(NamedTuple):
    """Of s B A, [layers, clients], NaN where a client has no such layer."""

    layers: tuple[str, ...]
    clients: tuple[int, ...]
    norm: np.ndarray  # Frobenius
    effective_rank: np.ndarray
    given_rank: np.ndarray  # the number of components


class Alike(NamedTuple):
    """Similarity of clients, [n, n], in the order ``clients``, in which alike ones are neighbours."""

    clients: tuple[int, ...]
    personal: np.ndarray
    labels: np.ndarray
    centred: bool  # personal parts are taken less their mean


class Held(NamedTuple):
    """The leaves of the newest checkpoint that low-rank parts and personal parts are made of."""

    checkpoint: Checkpoint
    clients: tuple[int, ...]
    personal: tuple[dict[str, np.ndarray], ...]  # of each of these clients
    shared: dict[str, np.ndarray]


def held(run: RunView, limit: int) -> Held | None:
    """None where there is no checkpoint, or the newest has more than ``limit`` bytes."""
    if not run.checkpoints or size(run) > limit:
        return None
    found, everyone = run.checkpoint, len(run.partition.train)
    clients = tuple(
        np.unique(np.linspace(0, everyone - 1, min(everyone, CLIENTS)).round().astype(int)).tolist()
    )
    personal = tuple(
        {name: value[0] for name, value in found.personal([client]).items()} for client in clients
    )
    return Held(found, clients, personal, found.shared())


def size(run: RunView) -> int:
    """Bytes of the newest checkpoint, not looked into."""
    return sum(file.stat().st_size for file in folder_of(run.path, run.checkpoints[-1]).iterdir())


def factored(run: RunView) -> bool:
    """Whether clients have low-rank factors of their own, by the names in the newest checkpoint;
    its bytes are trusted.
    """
    try:
        names = Checkpoint.read(folder_of(run.path, run.checkpoints[-1])).leaf_names([0])
    except (IndexError, ValueError):  # no checkpoint, or none that can be read
        return False
    return _with_factors(names)


def low_rank(run: RunView, parts: Held) -> LowRank | None:
    """Of every client's factors, its own or as it gets the shared ones; None where the method has
    none.
    """
    if not any(map(_with_factors, (parts.shared, *parts.personal))):
        return None
    found = [
        dict(_factors(run, client, own, parts.shared))
        for client, own in zip(parts.clients, parts.personal, strict=True)
    ]
    layers = tuple(dict.fromkeys(layer for of in found for layer in of))
    if not layers:
        return None
    table = np.full((3, len(layers), len(found)), np.nan)
    for column, of in enumerate(found):
        for row, layer in enumerate(layers):
            if layer in of:
                B, A, s = of[layer]
                table[:, row, column] = *measured(s * B, A), len(A)
    return LowRank(layers, parts.clients, *table)


def measured(B: np.ndarray, A: np.ndarray) -> tuple[float, float]:
    """(Frobenius norm, effective rank) of M = B A, [out, r] and [r, in], without forming it.

    Effective rank: (sum s^2)^2 / sum s^4 of its singular values, which is n for n equal ones; 0 of
    a zero matrix. With G = B' B and H = A A' the sums are tr(G H) and tr(G H G H).
    """
    B, A = B.astype(np.float64), A.astype(np.float64)
    product = (B.T @ B) @ (A @ A.T)
    square, fourth = product.trace(), float((product * product.T).sum())
    if square <= 0 or fourth <= 0:
        return 0.0, 0.0
    return float(square**0.5), float(square**2 / fourth)


def alike(run: RunView, parts: Held) -> Alike | None:
    """How similar the clients' personal parts are, and their mixes of labels; None for fewer than
    three clients.

    Personal parts: cosine of s B A where there are factors, else of all personal numbers less their
    mean over the clients (they begin alike). Labels: cosine of the numbers of training samples of
    each class. Of clients with different networks the largest part with equal leaves is taken.
    """
    shapes = [
        tuple((name, value.shape) for name, value in own.items() if _float(value))
        for own in parts.personal
    ]
    most = max(set(shapes), key=lambda shape: (shapes.count(shape), shape))
    chosen = [at for at, shape in enumerate(shapes) if shape == most]
    if len(chosen) < 3 or not most:
        return None
    own, clients = [parts.personal[at] for at in chosen], [parts.clients[at] for at in chosen]
    found = []
    if _with_factors(name for name, _ in most):
        found = [
            dict(_factors(run, client, of, {})) for client, of in zip(clients, own, strict=True)
        ]
    in_factors = bool(found and found[0])
    gram = np.zeros((len(chosen), len(chosen)))
    blocks = _products(found) if in_factors else _rows(own)
    for block in blocks:
        gram += block @ block.T
    similar = _cosine(gram)
    if similar is None:
        return None
    order = leaf_order(similar)
    counts = run.partition.train_counts[clients].astype(float)
    labels = _cosine(counts @ counts.T)
    assert labels is not None
    place = np.ix_(order, order)
    return Alike(
        tuple(np.array(clients)[order].tolist()), similar[place], labels[place], not in_factors
    )


def agreement(found: Alike) -> float:
    """Rank correlation (Spearman) of both similarities over the pairs of clients; NaN where one is
    constant.
    """
    pair = np.triu_indices(len(found.clients), 1)
    ranks = [_ranks(table[pair].round(9)) for table in (found.personal, found.labels)]
    if min(column.std() for column in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def leaf_order(similar: np.ndarray) -> np.ndarray:
    """[n] a permutation by average linkage: the two most similar clusters are joined, again and
    again.

    Of the four ways to put two clusters side by side the one whose neighbours are most similar is
    taken.
    """
    clusters = [[at] for at in range(len(similar))]
    mean = similar.astype(float).copy()
    np.fill_diagonal(mean, -np.inf)
    alive = list(range(len(similar)))
    for _ in range(len(similar) - 1):
        table = mean[np.ix_(alive, alive)]
        i, j = (alive[at] for at in np.unravel_index(table.argmax(), table.shape))
        a, b = clusters[i], clusters[j]
        ways = [(x, y) for x in (a, a[::-1]) for y in (b, b[::-1])]
        x, y = max(ways, key=lambda way: similar[way[0][-1], way[1][0]])
        weight = np.array([len(a), len(b)]) / (len(a) + len(b))
        mean[i] = weight @ mean[[i, j]]
        mean[:, i] = mean[i]
        mean[i, i] = -np.inf
        clusters[i] = x + y
        alive.remove(j)
    return np.array(clusters[alive[0]])


def _with_factors(leaves: Iterable[str]) -> bool:
    """Whether there may be factors among leaves of these names in a file."""
    return any(name.endswith(".B") for name in leaves)


def _factors(
    run: RunView, client: int, own: Mapping[str, np.ndarray], shared: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, float]]]:
    """(layer, (B [out, r], A [r, in], s)) of one client."""
    import torch

    network = run.networks[run.network_of[client]].leaves
    factors = _pairs(run.by_leaf(own, client), network)
    if shared and not factors:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in run.by_leaf(shared).items()}
            arrived = run.variants[client].download(tensors)
        factors = _pairs({name: value.numpy() for name, value in arrived.items()}, network)
    scales = _scales(run, client) if factors else {}
    for layer, (B, A) in factors.items():
        yield layer, (B, A.reshape(len(A), -1), scales.get(layer, scales.get("", 1.0)))


def _pairs(tree: Mapping[str, T], network: Container[str]) -> dict[str, tuple[T, T]]:
    """{layer: (B, A)} of the factors in ``tree``; a user's method may call them by plain names,
    which its own network has not.
    """
    plain = {
        plain_name(n): v
        for n, v in tree.items()
        if n[-3:-1] == ".." or not (is_own(n) or n in network)
    }
    layers = [n.removesuffix(".B") for n in plain if n.endswith(".B")]
    return {
        layer: (plain[f"{layer}.B"], plain[f"{layer}.A"])
        for layer in layers
        if f"{layer}.A" in plain
    }


def _scales(run: RunView, client: int) -> dict[str, float]:
    """The factor s before B A by layer, or of all layers under ""."""
    variant = run.variants[client]
    if getattr(variant, "scale", None) == "one":
        return {"": 1.0}
    if hasattr(variant, "scales"):
        return variant.scales(run.networks[run.network_of[client]])
    s = getattr(variant, "s", getattr(variant, "scale", 1.0))
    return {"": s if isinstance(s, int | float) else 1.0}


def _products(
    found: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray, float]]],
) -> Iterator[np.ndarray]:
    """s B A of all layers and clients, [n, coordinates], a block of rows of B at a time."""
    for layer in found[0]:
        B, A = (np.stack([of[layer][at] for of in found]) for at in (0, 1))
        s = np.array([of[layer][2] for of in found])[:, None, None]
        step = max(1, BLOCK // (len(found) * A.shape[2]))
        for start in range(0, B.shape[1], step):
            yield ((s * B[:, start : start + step]) @ A).reshape(len(found), -1)


def _rows(own: Sequence[Mapping[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """Every personal leaf of all clients less its mean, [n, coordinates]."""
    for name, first in own[0].items():
        if _float(first):
            rows = np.stack([of[name].ravel() for of in own]).astype(np.float64)
            yield rows - rows.mean(0)


def _cosine(gram: np.ndarray) -> np.ndarray | None:
    """Of rows with this Gram matrix; None where a row is zero."""
    norm = np.sqrt(np.diag(gram))
    if not (np.isfinite(gram).all() and norm.min() > 0):
        return None
    return np.clip(gram / norm / norm[:, None], -1, 1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values have their mean rank."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[at]


def _float(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating) and value.size > 0
