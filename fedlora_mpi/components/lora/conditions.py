"""How far the factors that clients trained are from what the server broadcasts after it.

A client keeps its trained factors as the personal leaves "last.<factor>", and in "last.round" the
round in which a broadcast of them would arrive. When that has arrived it can tell the distances; a
client without factors of the round before tells zeros and does not count.
"""

from collections.abc import Callable
from math import nan

import torch

from ...algorithm import Variables
from ...core.names import is_factor, method_leaf_name
from ...core.tree import Tree, add_prefix, select_prefix, sq_dist

FIGURES = ("condition_clients", "weak_condition", "strong_condition_B", "strong_condition_A")
_LAST, _ROUND = method_leaf_name("last"), method_leaf_name("last", "round")
_DISTANCE = method_leaf_name("distance")


def no_factors(shared: Tree) -> Tree:
    """Return a client's leaves before the first round."""
    zeros = {n: torch.zeros_like(v) for n, v in shared.items() if is_factor(n)}
    return add_prefix(zeros, _LAST) | {_ROUND: torch.tensor(-1.0)}


def keep_factors(v: Variables, round_: int) -> Variables:
    """Return a client's variables after training in round ``round_``, with its factors kept."""
    kept = add_prefix({n: w for n, w in v.shared.items() if is_factor(n)}, _LAST)
    number = torch.full_like(v.personal[_ROUND], round_ + 1)
    return v._replace(personal=v.personal | kept | {_ROUND: number})


def distances(v: Variables, products: Callable[[Tree], Tree], round_: int) -> Tree:
    """Return the distances that a client tells in round ``round_``, each [], to be summed.

    v: its variables as they arrived; products: {weight: s B A} of factors.
    """
    own = {n: w for n, w in select_prefix(v.personal, _LAST).items() if is_factor(n)}
    squares = (
        sq_dist(products(v.shared), products(own)),
        sq_dist(v.shared, own, [n for n in own if is_factor(n, "B")]),
        sq_dist(v.shared, own, [n for n in own if is_factor(n, "A")]),
    )
    counts = (v.personal[_ROUND] == round_).to(squares[0])
    values = counts, *(counts * square.sqrt() for square in squares)
    return add_prefix(dict(zip(FIGURES, values, strict=True)), _DISTANCE)


def figures(sums: Tree, equal_ranks: bool) -> dict[str, float]:
    """Return the numbers for the log from the clients' sums; NaN for what is not defined."""
    numbers = {n: float(v) for n, v in select_prefix(sums, _DISTANCE).items()}
    undefined = FIGURES[1:] if not numbers[FIGURES[0]] else () if equal_ranks else FIGURES[2:]
    return numbers | dict.fromkeys(undefined, nan)
