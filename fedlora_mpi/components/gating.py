"""Gates of pFedGate: multipliers for parts of the weights, under a budget.

Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation" (pFedGate),
ICML 2023, https://arxiv.org/abs/2305.02776, in the form of the official code.

Each parameter tensor is cut into runs of consecutive entries. A small network, the gate, gives each
run a multiplier. L is the number of runs of a model.

A gate has two kinds of leaves: ``gate.*`` are trained, ``seen.*`` are its running statistics.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

GATE_PREFIX, STATS_PREFIX = method_leaf_name("gate"), method_leaf_name("seen")
_EPS = 1e-5


class Cut(NamedTuple):
    """The runs of one tensor: numbers ``first`` to ``first + count - 1`` of all L runs."""

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing here calls
    length: int  # entries of a run
    sizes: tuple[int, ...]  # entries of each run; the last may be shorter than ``length``
    is_linear: bool  # whether the tensor belongs to a Linear layer


def cut_tensors(model: Model, blocks: int) -> dict[str, Cut]:
    """Return how each parameter tensor is cut into at most ``blocks`` runs of equal length."""
    cuts, first = {}, 0
    for name, leaf in model.leaves.items():
        if leaf.role == "stats":
            continue
        size = torch.Size(leaf.shape).numel()
        length = -(-size // min(blocks, size))
        sizes = tuple(min(length, size - at) for at in range(0, size, length))
        path, dot, _ = name.rpartition(".")
        owner = model.all_leaves.get(f"{path}{dot}weight")
        is_linear = owner is not None and owner.is_linear
        cuts[name] = Cut(first, len(sizes), length, sizes, is_linear)
        first += len(sizes)
    return cuts


def count_runs(cuts: dict[str, Cut]) -> int:
    """Return L, the number of runs of all tensors."""
    return sum(cut.count for cut in cuts.values())


def scale_runs(theta: Tree, cuts: dict[str, Cut], M: Tensor) -> Tree:
    """Return ``theta`` with each run multiplied by its entry of M [L].

    Leaves without a cut are unchanged.
    """
    factors = {}
    for leaf, cut in cuts.items():
        run_factors = M[cut.first : cut.first + cut.count, None].expand(cut.count, cut.length)
        factors[leaf] = run_factors.flatten()[: sum(cut.sizes)].view(theta[leaf].shape)
    return theta | {
        leaf: theta[leaf] * factor.to(theta[leaf].dtype) for leaf, factor in factors.items()
    }


def init_gate(shape: tuple[int, ...], L: int, rng: Generator) -> Tree:
    """Return the initial leaves of a gate with L outputs.

    shape: of an input, [channels, height, width].
    """
    channels, width = shape[0], torch.Size(shape).numel()
    gate = {"weight": (torch.rand(L, width, generator=rng) * 2 - 1) / width**0.5}  # as nn.Linear
    gate |= {"in.weight": torch.ones(channels), "in.means": torch.ones(3), "in.vars": torch.ones(3)}
    gate |= {"out.weight": torch.ones(L), "out.bias": torch.zeros(L)}
    stats = {"in.mean": torch.zeros(channels), "in.var": torch.zeros(channels)}
    stats |= {"out.mean": torch.zeros(L), "out.var": torch.ones(L)}
    return add_prefix(gate, GATE_PREFIX) | add_prefix(stats, STATS_PREFIX)


def gate_values(leaves: Tree, x: Tensor, real: Tensor | None, training: bool) -> Tensor:
    """Return M [L] in (0, 1) from inputs x [B, channels, ...]: the mean over the batch of

        g(x) = sigmoid(BatchNorm(W SwitchNorm(x)))

    Padding, where real [B] is False, does not count. In training the running statistics are updated
    in place.
    """
    gate, stats = select_prefix(leaves, GATE_PREFIX), select_prefix(leaves, STATS_PREFIX)
    real = torch.ones_like(x[:, 0, 0, 0]) if real is None else real.to(x)
    example_weights = (real / real.sum())[:, None]  # [B, 1], sums to 1
    x = _switch_norm(gate, stats, x.flatten(2), example_weights, training)
    score = x.flatten(1) @ gate["weight"].T  # [B, L]
    score = _batch_norm(gate, stats, score, example_weights, real.sum(), training)
    return (score.sigmoid() * example_weights).sum(0)


def _switch_norm(
    gate: Tree, stats: Tree, x: Tensor, example_weights: Tensor, training: bool
) -> Tensor:
    """Return x [B, channels, pixels] after switchable normalisation.

    Its mean is a learnt mix of three means: of a channel of one image, of an image, and of a
    channel over the batch. Its variance is mixed in the same way (Luo et al., ICLR 2019,
    https://arxiv.org/abs/1806.10779).
    """
    mean, var = x.mean(2), x.var(2)
    power = var + mean.square()
    mean_image = mean.mean(1, keepdim=True)
    var_image = power.mean(1, keepdim=True) - mean_image.square()
    mean_batch = (mean * example_weights).sum(0)
    var_batch = (power * example_weights).sum(0) - mean_batch.square()
    if training:
        _update_running(stats["in.mean"], mean_batch), _update_running(stats["in.var"], var_batch)
    else:
        mean_batch, var_batch = stats["in.mean"], stats["in.var"]
    a, b = gate["in.means"].softmax(0), gate["in.vars"].softmax(0)
    mean = a[0] * mean + a[1] * mean_image + a[2] * mean_batch
    var = b[0] * var + b[1] * var_image + b[2] * var_batch
    return (x - mean[..., None]) * (var[..., None] + _EPS).rsqrt() * gate["in.weight"][:, None]


def _batch_norm(
    gate: Tree, stats: Tree, score: Tensor, example_weights: Tensor, count: Tensor, training: bool
) -> Tensor:
    """Return score [B, L], normalised over the ``count`` real examples of the batch.

    A batch with one real example does not change the running variance.
    """
    mean, var = stats["out.mean"], stats["out.var"]
    if training:
        mean = (score * example_weights).sum(0)
        var = ((score - mean).square() * example_weights).sum(0)
        _update_running(stats["out.mean"], mean)
        _update_running(stats["out.var"], var * count / (count - 1).clamp(min=1), (count > 1) * 0.1)
    return (score - mean) * (var + _EPS).rsqrt() * gate["out.weight"] + gate["out.bias"]


@torch.no_grad()
def _update_running(running: Tensor, value: Tensor, momentum: float | Tensor = 0.1) -> None:
    """Move a running statistic towards ``value`` in place, as BatchNorm does."""
    running += momentum * (value - running)


def scale_gate_gradients(leaves: Tree, ratio: float) -> Tree:
    """Return ``leaves``; the gradients of the gate's trained ones are multiplied by ``ratio``."""
    return leaves | {
        n: w.detach() + ratio * (w - w.detach())
        for n, w in leaves.items()
        if n.startswith(GATE_PREFIX)
    }


def prune_gates(
    M: Tensor, cuts: dict[str, Cut], budget_share: float, min_gate: float, straight_through: bool
) -> Tensor:
    """Return M [L] with zero for the runs that ``select_runs`` drops by p = max(M, min_gate).

    With ``straight_through`` the other runs are multiplied by 1 + p - sg(p): p has a gradient.
    """
    p = M.clamp(min=min_gate)
    is_kept = select_runs(cuts, p.detach(), budget_share)
    return M * is_kept * (1 + (p - p.detach()) if straight_through else 1)


def select_runs(cuts: dict[str, Cut], importance: Tensor, budget_share: float) -> Tensor:
    """Return which runs are kept, [L] bool: the first of every tensor, and others by importance.

    The others are chosen greedily, separately in Linear layers and in all other layers. Runs are
    visited by falling round(10 importance), ties by position. A run is kept if it still fits the
    budget: the fraction ``budget_share`` of the entries of these other runs. importance: [L].
    """
    is_kept, rounded_importance = (
        torch.ones_like(importance, dtype=torch.bool),
        (10 * importance.double()).round(),
    )
    for linear in (False, True):
        candidates = [c for c in cuts.values() if c.is_linear == linear]
        run_indices = [c.first + i for c in candidates for i in range(1, c.count)]
        sizes = [size for c in candidates for size in c.sizes[1:]]
        if run_indices:
            index = torch.tensor(run_indices, device=rounded_importance.device)
            fits = greedy_knapsack(
                rounded_importance[index],
                torch.tensor(sizes, device=rounded_importance.device),
                round(sum(sizes) * budget_share),
            )
            is_kept = is_kept.scatter(0, index, fits)
    return is_kept


def greedy_knapsack(worth: Tensor, sizes: Tensor, capacity: int) -> Tensor:
    """Return which items are taken, [k] bool.

    Items are visited by falling worth; each is taken if it still fits the capacity.
    """
    order = worth.argsort(descending=True, stable=True)
    used, is_taken = torch.zeros_like(sizes[0]), []
    for size in sizes[order]:
        is_taken.append(used + size <= capacity)
        used = used + size * is_taken[-1]
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, torch.stack(is_taken))
