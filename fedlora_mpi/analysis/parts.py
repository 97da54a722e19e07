"""Measure what low-rank and personal parts have learned.

The measures are the effective rank and norm by layer and client, and the similarity of clients.
torch is imported only if the method has low-rank factors, for their scale s.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..core.names import display_name, is_method_leaf
from ..store.snapshot import Checkpoint, checkpoint_folder
from .run_view import RunView

T = TypeVar("T")
MAX_CLIENTS = 100  # largest number of clients that are read; they are evenly spread
BLOCK_SIZE = 1 << 24  # numbers of a matrix [clients, coordinates] in memory at a time


class LowRank(NamedTuple):
    """Measures of s B A, [layers, clients]; NaN if a client does not have the layer."""

    layers: tuple[str, ...]  # readable names, see ``layer_names``
    clients: tuple[int, ...]
    norm: np.ndarray  # Frobenius
    effective_rank: np.ndarray
    num_components: np.ndarray  # number of components r


class ClientSimilarity(NamedTuple):
    """Similarity of clients, [n, n].

    clients: the order of rows and columns, in which similar clients are neighbours.
    personal: cosine of their personal parts; labels: cosine of their label counts.
    """

    clients: tuple[int, ...]
    personal: np.ndarray
    labels: np.ndarray
    is_centered: bool  # the mean over the clients is subtracted from personal parts


class CheckpointLeaves(NamedTuple):
    """The personal leaves of some clients and the shared leaves of the newest checkpoint."""

    checkpoint: Checkpoint
    clients: tuple[int, ...]
    personal: tuple[dict[str, np.ndarray], ...]  # of each client in ``clients``
    shared: dict[str, np.ndarray]


def read_leaves(run: RunView, max_bytes: int) -> CheckpointLeaves | None:
    """Read the leaves of the newest checkpoint, of at most ``MAX_CLIENTS`` clients.

    Returns None if there is no checkpoint or the newest has more than ``max_bytes``.
    """
    if not run.checkpoints or checkpoint_bytes(run) > max_bytes:
        return None
    checkpoint, num_clients = run.checkpoint, len(run.partition.train)
    clients = tuple(
        np.unique(
            np.linspace(0, num_clients - 1, min(num_clients, MAX_CLIENTS)).round().astype(int)
        ).tolist()
    )
    personal = tuple(
        {name: value[0] for name, value in checkpoint.personal([client]).items()}
        for client in clients
    )
    return CheckpointLeaves(checkpoint, clients, personal, checkpoint.shared())


def checkpoint_bytes(run: RunView) -> int:
    """Return the size of the newest checkpoint's files, in bytes."""
    return sum(
        file.stat().st_size for file in checkpoint_folder(run.path, run.checkpoints[-1]).iterdir()
    )


def has_own_factors(run: RunView) -> bool:
    """Return whether clients have personal low-rank factors.

    The names of client 0's leaves in the newest checkpoint decide; its checksums are not verified.
    """
    try:
        names = Checkpoint.read(checkpoint_folder(run.path, run.checkpoints[-1])).leaf_names([0])
    except (IndexError, ValueError):  # no checkpoint, or an unreadable one
        return False
    return _has_factors(names)


def low_rank(run: RunView, parts: CheckpointLeaves) -> LowRank | None:
    """Measure every client's low-rank factors.

    They are the client's personal factors, or else the shared ones as it downloads them. Returns
    None if the method has no low-rank factors.
    """
    if not any(map(_has_factors, (parts.shared, *parts.personal))):
        return None
    factors_of = [
        dict(_factors(run, client, personal, parts.shared))
        for client, personal in zip(parts.clients, parts.personal, strict=True)
    ]
    layers = tuple(dict.fromkeys(layer for factors in factors_of for layer in factors))
    if not layers:
        return None
    table = np.full((3, len(layers), len(factors_of)), np.nan)
    for column, of in enumerate(factors_of):
        for row, layer in enumerate(layers):
            if layer in of:
                B, A, s = of[layer]
                table[:, row, column] = *norm_and_effective_rank(s * B, A), len(A)
    dims = {name: leaf.dim() for net in run.networks for name, leaf in net.all_values.items()}
    return LowRank(layer_names(layers, dims), parts.clients, *table)


def layer_names(weights: Sequence[str], dims: Mapping[str, int]) -> tuple[str, ...]:
    """Return a readable name for each weight: the path of its layer, such as ``layer1.0.conv1``.

    A path of numbers alone, as in a Sequential, becomes the kind of the layer and its place among
    ``weights``, such as ``conv 1``. dims: {weight: its number of dimensions}.
    """
    kinds = {2: "linear", 3: "conv", 4: "conv", 5: "conv"}
    paths = [weight.removesuffix(".weight") for weight in weights]
    return tuple(
        f"{kinds.get(dims.get(weight, 0), 'layer')} {place}"
        if path.replace(".", "").isdigit()
        else path
        for place, (weight, path) in enumerate(zip(weights, paths, strict=True), 1)
    )


def norm_and_effective_rank(B: np.ndarray, A: np.ndarray) -> tuple[float, float]:
    """Return (Frobenius norm, effective rank) of M = B A, without computing M [out, in].

    B is [out, r], A is [r, in]. The effective rank is (sum s^2)^2 / sum s^4 of M's singular values
    s: n for n equal ones, 0 for a zero matrix. With G = B' B and H = A A' the sums are tr(G H) and
    tr(G H G H).
    """
    B, A = B.astype(np.float64), A.astype(np.float64)
    product = (B.T @ B) @ (A @ A.T)
    square, fourth = product.trace(), float((product * product.T).sum())
    if square <= 0 or fourth <= 0:
        return 0.0, 0.0
    return float(square**0.5), float(square**2 / fourth)


def client_similarity(run: RunView, parts: CheckpointLeaves) -> ClientSimilarity | None:
    """Return the similarity of the clients' personal parts and of their label counts.

    Personal parts: the cosine of s B A if the clients have factors. Otherwise it is the cosine of
    all personal numbers minus their mean over the clients, because all clients start from the same
    numbers. Labels: the cosine of the numbers of training samples per class. If the clients have
    different networks, the largest set of clients with equal leaves is compared. Returns None for
    fewer than three clients, without personal leaves, or if a personal part is zero.
    """
    shapes = [
        tuple((name, value.shape) for name, value in personal_parts.items() if _is_float(value))
        for personal_parts in parts.personal
    ]
    common_shapes = max(set(shapes), key=lambda shape: (shapes.count(shape), shape))
    selected = [index for index, shape in enumerate(shapes) if shape == common_shapes]
    if len(selected) < 3 or not common_shapes:
        return None
    own, clients = [parts.personal[at] for at in selected], [parts.clients[at] for at in selected]
    factors_of = []
    if _has_factors(name for name, _ in common_shapes):
        factors_of = [
            dict(_factors(run, client, personal, {}))
            for client, personal in zip(clients, own, strict=True)
        ]
    in_factors = bool(factors_of and factors_of[0])
    gram = np.zeros((len(selected), len(selected)))
    blocks = _products(factors_of) if in_factors else _centered_rows(own)
    for block in blocks:
        gram += block @ block.T
    similar = _cosine_similarity(gram)
    if similar is None:
        return None
    order = leaf_order(similar)
    counts = run.partition.train_counts[clients].astype(float)
    labels = _cosine_similarity(counts @ counts.T)
    assert labels is not None
    in_order = np.ix_(order, order)
    return ClientSimilarity(
        tuple(np.array(clients)[order].tolist()),
        similar[in_order],
        labels[in_order],
        not in_factors,
    )


def rank_correlation(similarity: ClientSimilarity) -> float:
    """Return the rank correlation (Spearman) of the two similarities over all pairs of clients.

    It is NaN if one of them is constant.
    """
    pair = np.triu_indices(len(similarity.clients), 1)
    ranks = [
        _mean_ranks(table[pair].round(9)) for table in (similarity.personal, similarity.labels)
    ]
    if min(column.std() for column in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def leaf_order(similar: np.ndarray) -> np.ndarray:
    """Return a permutation [n] that puts similar rows side by side, by average linkage.

    Average linkage joins the two most similar clusters until one is left. There are four ways to
    put two clusters side by side; the one whose neighbours are most similar is taken.
    """
    clusters = [[index] for index in range(len(similar))]
    mean = similar.astype(float).copy()
    np.fill_diagonal(mean, -np.inf)
    alive = list(range(len(similar)))
    for _ in range(len(similar) - 1):
        table = mean[np.ix_(alive, alive)]
        i, j = (alive[at] for at in np.unravel_index(table.argmax(), table.shape))
        a, b = clusters[i], clusters[j]
        orders = [(x, y) for x in (a, a[::-1]) for y in (b, b[::-1])]
        x, y = max(orders, key=lambda order: similar[order[0][-1], order[1][0]])
        weight = np.array([len(a), len(b)]) / (len(a) + len(b))
        mean[i] = weight @ mean[[i, j]]
        mean[:, i] = mean[i]
        mean[i, i] = -np.inf
        clusters[i] = x + y
        alive.remove(j)
    return np.array(clusters[alive[0]])


def _has_factors(leaves: Iterable[str]) -> bool:
    """Return whether leaves with these names in a file may include low-rank factors."""
    return any(name.endswith(".B") for name in leaves)


def _factors(
    run: RunView, client: int, personal: Mapping[str, np.ndarray], shared: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, float]]]:
    """Yield (layer, (B [out, r], A [r, in], s)) of one client.

    If it has no personal factors, they are the factors that it downloads from ``shared``.
    """
    import torch

    network = run.networks[run.network_of[client]].leaves
    factors = _factor_pairs(run.by_leaf(personal, client), network)
    if shared and not factors:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in run.by_leaf(shared).items()}
            arrived = run.transports[client].download(tensors)
        factors = _factor_pairs({name: value.numpy() for name, value in arrived.items()}, network)
    scales = _scales(run, client) if factors else {}
    for layer, (B, A) in factors.items():
        yield layer, (B, A.reshape(len(A), -1), scales.get(layer, scales.get("", 1.0)))


def _factor_pairs(tree: Mapping[str, T], network: Container[str]) -> dict[str, tuple[T, T]]:
    """Return {layer: (B, A)} of the factors in ``tree``.

    A user's method may give them plain names; such a name must not be in ``network``.
    """
    plain = {
        display_name(n): v
        for n, v in tree.items()
        if n[-3:-1] == ".." or not (is_method_leaf(n) or n in network)
    }
    layers = [n.removesuffix(".B") for n in plain if n.endswith(".B")]
    return {
        layer: (plain[f"{layer}.B"], plain[f"{layer}.A"])
        for layer in layers
        if f"{layer}.A" in plain
    }


def _scales(run: RunView, client: int) -> dict[str, float]:
    """Return the factor s in s B A, by layer, or under "" for all layers."""
    variant = run.transports[client].method
    if getattr(variant, "scale", None) == "one":
        return {"": 1.0}
    if hasattr(variant, "scales"):
        return variant.scales(run.networks[run.network_of[client]])
    s = getattr(variant, "s", getattr(variant, "scale", 1.0))
    return {"": s if isinstance(s, int | float) else 1.0}


def _products(
    factors_of: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray, float]]],
) -> Iterator[np.ndarray]:
    """Yield s B A of all layers and clients as blocks [n, coordinates] of some rows of B."""
    for layer in factors_of[0]:
        B, A = (np.stack([factors[layer][at] for factors in factors_of]) for at in (0, 1))
        s = np.array([of[layer][2] for of in factors_of])[:, None, None]
        step = max(1, BLOCK_SIZE // (len(factors_of) * A.shape[2]))
        for start in range(0, B.shape[1], step):
            yield ((s * B[:, start : start + step]) @ A).reshape(len(factors_of), -1)


def _centered_rows(personal_parts: Sequence[Mapping[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield each personal leaf of all clients minus its mean over the clients, [n, coordinates]."""
    for name, first in personal_parts[0].items():
        if _is_float(first):
            rows = np.stack([personal[name].ravel() for personal in personal_parts]).astype(
                np.float64
            )
            yield rows - rows.mean(0)


def _cosine_similarity(gram: np.ndarray) -> np.ndarray | None:
    """Return the cosine similarity of rows with this Gram matrix [n, n].

    Returns None if a row is zero or a number is not finite.
    """
    norm = np.sqrt(np.diag(gram))
    if not (np.isfinite(gram).all() and norm.min() > 0):
        return None
    return np.clip(gram / norm / norm[:, None], -1, 1)


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value; equal values get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _is_float(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating) and value.size > 0
