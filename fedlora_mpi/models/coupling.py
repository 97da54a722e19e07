"""Test whether a network couples the examples of a batch.

Padding, the division of a test set into batches, and clients of unequal size in one stack do not
change the results of a network that treats each example independently. Normalisation by batch
statistics, or a sort, softmax or attention over the batch, couples examples. No layer declares
this, so the network is tried.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from ..core.batch import Batch
from ..core.seeds import rng
from ..core.tree import Tree
from .network import Model

# (examples of a batch, examples of its first part); the second pair only for cheap networks
_BATCH_CUTS = ((5, 3), (40, 33))
_CHEAP_FLOPS = 2e7  # FLOPs of one example below which a network is cheap
_MANY_PARAMETERS = 2**24  # above this, no copy of the network in double precision is made
_OUTLIER_SCALE = 10.0  # factor of the inputs of the second part
# Relative to the largest number. Different kernels deviate less, coupled examples more; in half
# precision the two are close.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}


def couples_examples(model: Model, seed: int) -> bool:
    """Return whether results change when batches are cut and padded.

    The weights are the initial ones plus random noise, so that a gate with initial value zero hides
    nothing. A network that fails on such batches counts as coupling them.
    """
    # the passes may change the modules' state, so they run on a copy
    model_copy = replace(model, modules=copy.deepcopy(model.modules))
    is_large = sum(v.numel() for v in model.initial.values()) > _MANY_PARAMETERS
    narrowest_dtype = min(
        (v.dtype for v in model.initial.values()),
        key=lambda dtype: dtype.itemsize,
        default=torch.float32,
    )
    for dtype in (
        (narrowest_dtype,)
        if is_large or narrowest_dtype != torch.float32
        else (torch.float64, torch.float32)
    ):
        try:
            return _depends_on_batch(model_copy, seed, dtype)
        except Exception:  # a user's module may raise anything, and may support one precision only
            continue
    return True


@torch.no_grad()
def _depends_on_batch(model: Model, seed: int, dtype: torch.dtype) -> bool:
    generator = rng(seed, "coupling")
    tree = {n: _add_noise(v, model.role(n) == "stats", generator) for n, v in model.initial.items()}
    if dtype == torch.float64:
        tree = {n: v.double() for n, v in tree.items()}
    for size, cut in _BATCH_CUTS[: 2 if model.flops < _CHEAP_FLOPS else 1]:
        x = _random_inputs(model, size, cut, generator)
        x = x.double() if x.is_floating_point() and dtype == torch.float64 else x
        if any(
            couples(model, tree, x, cut, _TOLERANCES[dtype])
            for couples in (_evaluation_couples, _training_couples)
        ):
            return True
    return False


def _add_noise(v: Tensor, positive: bool, generator: Generator) -> Tensor:
    """Return ``v`` with noise of half its own size or of half the typical size of such weights.

    The larger of the two is used. ``positive``: the noise is positive, as statistics need.
    """
    typical_size = v[0].numel() ** -0.5 if v.dim() > 1 and v.numel() else 1.0
    noise_size = max(typical_size, float(v.double().square().mean().sqrt())) if v.numel() else 0.0
    noise = (torch.randn(v.shape, generator=generator) * noise_size / 2).to(v.dtype)
    return v + (noise.abs() if positive else noise)


def _random_inputs(model: Model, size: int, cut: int, generator: Generator) -> Tensor:
    """Return random inputs [size, *shape]; from row ``cut`` on they are larger, or longer texts."""
    if not model.tokens:
        x = torch.randn(size, *model.shape, generator=generator)
        return torch.cat([x[:cut], _OUTLIER_SCALE * x[cut:]])
    x = torch.randint(0, model.tokens, (size, *model.shape), generator=generator)
    length = model.shape[-1]
    lengths = torch.randint(1, max(2, length // 2 + 1), (size, 1), generator=generator)
    lengths[cut:] = length
    first = x[:, :1].clamp(min=min(1, model.tokens - 1))  # a text has at least one word
    return torch.cat([first, torch.where(torch.arange(1, length) < lengths, x[:, 1:], 0)], 1)


def _evaluation_couples(model: Model, tree: Tree, x: Tensor, cut: int, tolerance: float) -> bool:
    """Return whether the logits of a whole batch differ from those of its two parts."""
    run = _make_pass(model.eval_mode(), tree)
    (logits, _), (first, _), (second, _) = run(x), run(x[:cut]), run(x[cut:])
    return not _is_close(torch.cat([first, second]), logits, tolerance)


def _training_couples(model: Model, tree: Tree, x: Tensor, cut: int, tolerance: float) -> bool:
    """Return whether padding changes the logits of real examples or what is written to leaves."""
    run, real = _make_pass(model, tree), torch.arange(len(x), device=x.device) < cut
    (alone, alone_leaves), (padded, padded_leaves) = run(x[:cut]), run(x, real)
    return not (
        _is_close(padded[:cut], alone, tolerance)
        and all(_is_close(padded_leaves[n], v, tolerance) for n, v in alone_leaves.items())
    )


def _make_pass(model: Model, tree: Tree) -> Callable[..., tuple[Tensor, Tree]]:
    """Return a function that maps inputs, and which of them are real, to (logits, leaves).

    The leaves are those after the pass.
    """

    def run(x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tree]:
        batch = Batch(
            x,
            x.new_zeros(len(x), dtype=torch.int64),
            real,
            torch.tensor(1),
            torch.zeros(model.classes),
        )
        leaves = {n: v.clone() for n, v in tree.items()}
        with model.training_context(batch):
            return model(leaves, x), leaves

    return run


def _is_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether two tensors agree within a tolerance; infinities and nan must be equal."""
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(
        torch.where(finite, 0, a).nan_to_num(nan=1.0), torch.where(finite, 0, b).nan_to_num(nan=1.0)
    ):
        return False
    a, b = a[finite], b[finite]
    return not len(a) or float((a - b).abs().max()) <= tolerance * float(b.abs().max())
