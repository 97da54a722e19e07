"""The components of low-rank parts: row i of A and column i of B, in all layers alike."""

from typing import cast

import torch
from torch import Tensor

from ...core.names import factor_name, factors_by_weight
from ...core.tree import Tree, numel, split
from ..lowrank import is_not_factor


def factor_pairs(tree: Tree) -> dict[str, tuple[Tensor, Tensor]]:
    """{weight: (A, B)} of all factors in ``tree``."""
    return {n: (A, tree[factor_name(n, "B")]) for n, A in factors_by_weight(tree, "A").items()}


def max_components(tree: Tree) -> int:
    """The largest number of components of any weight."""
    return max(len(A) for A, _ in factor_pairs(tree).values())


def components_numel(tree: Tree, lora_rank: int) -> int:
    """How many numbers ``tree`` holds without the components after the first ``lora_rank``."""
    factors_numel = sum(
        min(lora_rank, len(A)) * (A.shape[1] + len(B)) for A, B in factor_pairs(tree).values()
    )
    return factors_numel + numel(split(tree, is_not_factor)[0])


def select_components(tree: Tree, first: Tensor | int, end: Tensor) -> Tree:
    """``tree`` with factors that are zero outside the components from ``first`` up to, but without,
    ``end``.
    """
    selected = {}
    for name, (A, B) in factor_pairs(tree).items():
        index = torch.arange(len(A), device=A.device)
        is_selected = (first <= index) & (index < end)  # [r]
        selected[factor_name(name, "A")] = torch.where(is_selected[:, None], A, 0.0)
        selected[factor_name(name, "B")] = torch.where(is_selected, B, 0.0)
    return tree | selected


def norm_of_products(tree: Tree) -> Tensor:
    """The norm of all products B A together, []. It forms no product: ||B A||^2 = sum (B' B) o (A
    A'), where both matrices are [r, r].
    """
    squares = (((B.T @ B) * (A @ A.T)).sum() for A, B in factor_pairs(tree).values())
    return cast(Tensor, sum(squares)).clamp(min=0).sqrt()


def product_of_norms(tree: Tree) -> Tensor:
    """sum ||B|| ||A|| over all weights, []."""
    norm = torch.linalg.vector_norm  # its gradient at zero is zero
    return cast(Tensor, sum(norm(A) * norm(B) for A, B in factor_pairs(tree).values()))
