"""How far the clients of a topology are from agreeing, ||x_i - mean_j x_j||^2."""

import torch
from torch import Tensor

from ..aggregation.exact_sum import ExactSum
from ..aggregation.flat_layout import Layout
from .federation import Federation, State


def consensus_distances(federation: Federation, state: State) -> dict[int, float]:
    """The squared distance of the exchanged parameters of each client of this rank from their mean
    over all clients; {} without a topology. Every rank calls it.

    The sum over the clients is exact, so the distances do not depend on the ranks. It is one
    message, which no real federation sends.
    """
    mixing = federation.aggregator.mixing
    if not (federation.matrix and mixing):
        return {}
    layout = _parameter_layout(federation, mixing.row_layout)
    vectors = {
        client: _row(federation, state, client, layout)
        for client in federation.placement.local_clients
    }
    total = ExactSum(layout.size)
    for vector in vectors.values():
        total.add(vector, 1)
    federation.comm.sum(total.buffer)
    mean = total.total() / len(federation.clients)
    return {client: _squared_distance(vector, mean) for client, vector in vectors.items()}


def _parameter_layout(federation: Federation, rows: Layout) -> Layout:
    """The exchanged leaves that are parameters of the network, or else all but statistics."""
    role = federation.clients.trainer.model.role
    names = [n for n in rows.shapes if role(n) not in (None, "stats")]
    names = names or [n for n in rows.shapes if role(n) != "stats"]
    dtypes = {n: dtype for n, dtype in rows.dtypes.items() if n in names}
    return Layout({n: rows.shapes[n] for n in names}, dtypes)


def _row(federation: Federation, state: State, client: int, layout: Layout) -> Tensor:
    """The exchanged parameters [D] of a client of this rank."""
    leaves = federation.store.read(state.personal, [client])
    return layout.pack({n: leaves[n][0] for n in layout.shapes})


def _squared_distance(vector: Tensor, mean: Tensor) -> float:
    return torch.square(vector.double() - mean).sum().item()
