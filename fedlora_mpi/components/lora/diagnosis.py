"""The numbers of ``FineTuning.diagnose``: how far an aggregate is from the exact mean of updates.

An update is {weight: its matrix [out side, in side]}, low-rank and dense part together.
"""

from math import nan
from typing import cast

from torch import Tensor

from ...algorithm import Aggregate
from ...core.names import method_leaf_name
from ...core.tree import Tree, add_prefix, select_prefix

FIGURES = ("effective_clients", "lora_truncation", "lora_bias", "lora_update_bias")
# leaves of ``client_metrics``
_WEIGHT, _SQUARE = method_leaf_name("weight"), method_leaf_name("square")
_END, _CHANGE = method_leaf_name("end"), method_leaf_name("change")


def client_metrics(
    server: Tree, received: Tree, trained: Tree, weights: Tree, count: Tensor
) -> Tree:
    """The leaves whose mean ``figures`` needs.

    server, received, trained: the update of the server, the one that the client received, and that
    after its training. weights: {name: []} the client's aggregation weights; count: [] its samples
    n_k. All means are weighted by n_k, which is why some leaves are divided by it.
    """
    truncation = sum((server[name] - d).square().sum() for name, d in received.items())
    change = {name: d - received[name] for name, d in trained.items()}
    tree = {"one": 1 / count, "truncation": truncation / count}
    for name, w in weights.items():
        tree |= {_WEIGHT + name: w / count, _SQUARE + name: w.square() / count}
    return tree | add_prefix(trained, _END) | add_prefix(change, _CHANGE)


def figures(before: Tree, after: Tree, aggregate: Aggregate) -> dict[str, float]:
    """The numbers for the log; ``before`` and ``after``: the server's update at either end of the
    round. The first is NaN if no client has a weight whose square is above 0.
    """
    mean = aggregate.metrics
    squares = select_prefix(mean, _SQUARE)
    shares = [
        w.square() / (squares[n] * mean["one"])
        for n, w in select_prefix(mean, _WEIGHT).items()
        if squares[n] > 0  # else nobody of the cohort counts, as in a partition of raflora
    ]
    # effective clients as a part of the cohort; unknown if all weights are too small to be squared
    share = sum(map(float, shares)) / len(shares) if shares else nan
    change = {n: v - before[n] for n, v in after.items()}
    values = (
        share * aggregate.clients,
        float(mean["truncation"] / mean["one"]),
        _distance(select_prefix(mean, _END), after),
        _distance(select_prefix(mean, _CHANGE), change),
    )
    return dict(zip(FIGURES, values, strict=True))


def _distance(exact: Tree, approximation: Tree) -> float:
    squares = ((approximation[n] - v).square().sum() for n, v in exact.items())
    return float(cast(Tensor, sum(squares)).sqrt())
