"""A shared network whose blocks of weights each client's own gate scales, and drops under a budget.

Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation" (pFedGate), ICML
2023, https://arxiv.org/abs/2305.02776. Each parameter tensor of theta is cut into at most ``blocks``
runs of equal length, L runs in all. The gate phi_i sees a batch of inputs x:

    g(x) = sigmoid(BatchNorm(W SwitchNorm(x))) in (0, 1)^L      M = mean over the batch of g(x)
    theta_i = theta * M, run by run;  theta and phi_i descend on CE(theta_i) at once, phi_i with gate_lr
    theta <- sum_i (n_i / n) theta_i;  phi_i never leaves client i

Sparsity s < 1: with s_min = min(max(1 / blocks, 0.1), s) the first run of every tensor stays; of the
others, Linear layers and the rest apart, those with the largest round(10 max(M, s_min)) stay that
still fit into round((s - s_min) sum of their sizes), taken greedily. Dropped runs count as zero.
``straight_through``: runs that stay are also multiplied by 1 + p - sg(p), p = max(M, s_min), as in
the official code; false: the choice is a constant. Accuracy is that after training.
BatchNorm: the network's affine parameters are scaled like all others, its statistics averaged; the
gate's own are the client's.
Bytes per client and round: all leaves of the model up and down, whatever s.
Deviations: the client predicts with one M, of all its training samples (client_level_adapt of the
official code), where the code takes M from each batch of test samples, so that a prediction would
depend on its neighbours; gradient norms are not clipped at 10; ties are broken by position; no
separate layer for the multipliers (seperate_trans); the code's ReLU on the logits is left out, and
so are the biases of W and of SwitchNorm, which BatchNorm takes off again.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..algorithm import Algorithm, Batch, Phase, Step, Train, Vars
from ..batch import cross_entropy
from ..bounds import bounded
from ..models.network import Model
from ..tree import Tree

_GATE, _SEEN = "gate.", "seen."  # what the gate learns, and what it keeps of the data
_EPS = 1e-5


class Cut(NamedTuple):
    """A tensor's runs are the numbers ``first`` to ``first + count`` of all."""

    first: int
    count: int
    length: int
    sizes: tuple[int, ...]  # entries in each; the last may have fewer than ``length``
    linear: bool  # belongs to a Linear layer


@dataclass(frozen=True)
class PFedGate(Algorithm):
    """``absent: stale``, as in the official code. ``sparsity``: s, the share of weights kept."""

    evaluates: ClassVar = "after_training"
    surveys: ClassVar = True
    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "stale"
    sparsity: float = 1.0
    gate_lr: float = 0.1
    blocks: int = 5
    straight_through: bool = True

    def __post_init__(self) -> None:
        bounded(self, sparsity="(0, 1]", gate_lr="(0, inf)", blocks="[1, inf)")

    def check(self, model: Model, train: Train) -> None:
        if len(model.shape) != 3:
            raise ValueError(f"name = pfedgate: needs images, not inputs of shape {list(model.shape)}")

    def init(self, model: Model, rng: Generator) -> Vars:
        channels, width = model.shape[0], torch.Size(model.shape).numel()
        last = list(cuts(model, self.blocks).values())[-1]
        runs = last.first + last.count
        gate = {"weight": (torch.rand(runs, width, generator=rng) * 2 - 1) / width**0.5}  # as nn.Linear
        gate |= {"in.weight": torch.ones(channels), "in.means": torch.ones(3), "in.vars": torch.ones(3)}
        gate |= {"out.weight": torch.ones(runs), "out.bias": torch.zeros(runs)}
        seen = {"in.mean": torch.zeros(channels), "in.var": torch.zeros(channels)}
        seen |= {"out.mean": torch.zeros(runs), "out.var": torch.ones(runs), "M": torch.full((runs,), 0.5)}
        own = {_GATE + n: v for n, v in gate.items()} | {_SEEN + n: v for n, v in seen.items()}
        return Vars(model.initial, own)

    def phases(self, model: Model, train: Train, round_: int) -> tuple[Phase, ...]:
        faster = self.gate_lr / train.lr

        def loss(now: Vars, start: Vars, batch: Batch) -> Tensor:
            personal = {n: _hurried(v, faster) if n.startswith(_GATE) else v for n, v in now.personal.items()}
            M = self.multipliers(model, personal, batch)
            return cross_entropy(model(self.adapted(model, now.shared, M), batch.x), batch)

        return (Phase(train.epochs, (Step(loss, lambda leaf: not leaf.startswith(_SEEN)),)),)

    def finish(self, model: Model, train: Train, start: Vars, end: Vars, data: Batch) -> Vars:
        M = self.multipliers(model.evaluating(), end.personal, data)
        return end._replace(personal=end.personal | {_SEEN + "M": M})

    def weights_of(self, model: Model, v: Vars) -> Tree:
        return self.adapted(model, v.shared, v.personal[_SEEN + "M"])

    def adapted(self, model: Model, theta: Tree, M: Tensor) -> Tree:
        """theta_i: every run of every tensor times its number of M [L]."""
        found = {}
        for leaf, cut in cuts(model, self.blocks).items():
            wide = M[cut.first : cut.first + cut.count, None].expand(cut.count, cut.length)
            found[leaf] = theta[leaf] * wide.flatten()[: sum(cut.sizes)].view(model.leaves[leaf].shape)
        return theta | found

    def multipliers(self, model: Model, personal: Tree, batch: Batch) -> Tensor:
        """M [L], zero where a run is dropped. In training mode the gate's statistics move."""
        M = open_gate(personal, batch.x, batch.real, model.training)
        if self.sparsity == 1:
            return M
        least = min(max(1 / self.blocks, 0.1), self.sparsity)
        importance = M.clamp(min=least)
        stays = self.stays(model, importance.detach(), self.sparsity - least)
        return M * stays * (1 + (importance - importance.detach()) if self.straight_through else 1)

    def stays(self, model: Model, importance: Tensor, share: float) -> Tensor:
        """Which runs stay, [L] bool; ``share``: of the entries that are not in a first run."""
        stays, worth = torch.ones_like(importance, dtype=torch.bool), (10 * importance.double()).round()
        for linear in (False, True):
            chosen = [c for c in cuts(model, self.blocks).values() if c.linear == linear]
            places = [c.first + i for c in chosen for i in range(1, c.count)]
            sizes = [size for c in chosen for size in c.sizes[1:]]
            if places:
                at = torch.tensor(places, device=worth.device)
                fits = greedy(worth[at], torch.tensor(sizes, device=worth.device), round(sum(sizes) * share))
                stays = stays.scatter(0, at, fits)
        return stays


def cuts(model: Model, blocks: int) -> dict[str, Cut]:
    """How each parameter tensor is cut."""
    found, first = {}, 0
    for name, leaf in model.leaves.items():
        if leaf.role == "stats":
            continue
        size = torch.Size(leaf.shape).numel()
        length = -(-size // min(blocks, size))
        sizes = tuple(min(length, size - at) for at in range(0, size, length))
        owner = model.leaves.get(name.rpartition(".")[0] + ".weight")
        found[name] = Cut(first, len(sizes), length, sizes, bool(owner) and owner.matrix == "linear")
        first += len(sizes)
    return found


def open_gate(personal: Tree, x: Tensor, real: Tensor | None, training: bool) -> Tensor:
    """M [L] in (0, 1) from inputs x [B, channels, ...]; padding does not count."""
    gate = {n.removeprefix(_GATE): v for n, v in personal.items() if n.startswith(_GATE)}
    seen = {n.removeprefix(_SEEN): v for n, v in personal.items() if n.startswith(_SEEN)}
    real = torch.ones_like(x[:, 0, 0, 0]) if real is None else real.to(x)
    count, each = real.sum(), (real / real.sum())[:, None]  # each: [B, 1], sums to 1
    x = x.flatten(2)  # [B, channels, pixels]

    # SwitchNorm: mean and variance of a channel of one image, of an image, of a channel over the batch
    mean, var = x.mean(2), x.var(2)
    power = var + mean.square()
    mean_image = mean.mean(1, keepdim=True)
    var_image = power.mean(1, keepdim=True) - mean_image.square()
    mean_batch = (mean * each).sum(0)
    var_batch = (power * each).sum(0) - mean_batch.square()
    if training:
        _follow(seen["in.mean"], mean_batch), _follow(seen["in.var"], var_batch)
    else:
        mean_batch, var_batch = seen["in.mean"], seen["in.var"]
    a, b = gate["in.means"].softmax(0), gate["in.vars"].softmax(0)
    mean = a[0] * mean + a[1] * mean_image + a[2] * mean_batch
    var = b[0] * var + b[1] * var_image + b[2] * var_batch
    x = (x - mean[..., None]) * (var[..., None] + _EPS).rsqrt() * gate["in.weight"][:, None]

    score = x.flatten(1) @ gate["weight"].T  # [B, L]
    mean, var = seen["out.mean"], seen["out.var"]
    if training:
        mean = (score * each).sum(0)
        var = ((score - mean).square() * each).sum(0)
        _follow(seen["out.mean"], mean)
        _follow(seen["out.var"], var * count / (count - 1).clamp(min=1), (count > 1) * 0.1)
    score = (score - mean) * (var + _EPS).rsqrt() * gate["out.weight"] + gate["out.bias"]
    return (score.sigmoid() * each).sum(0)


def greedy(worth: Tensor, sizes: Tensor, capacity: int) -> Tensor:
    """[k] bool: taken in the order of falling worth, those that still fit into the capacity."""
    order = worth.argsort(descending=True, stable=True)
    used, taken = torch.zeros_like(sizes[0]), []
    for size in sizes[order]:
        taken.append(used + size <= capacity)
        used = used + size * taken[-1]
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, torch.stack(taken))


def _hurried(w: Tensor, factor: float) -> Tensor:
    """``w`` whose gradient is ``factor`` times as large: SGD with that many times the learning rate."""
    return w.detach() + factor * (w - w.detach())


@torch.no_grad()
def _follow(running: Tensor, value: Tensor, momentum: float | Tensor = 0.1) -> None:
    """Move a running statistic in place, as BatchNorm does."""
    running += momentum * (value - running)
