"""Whether a network treats the examples of a batch apart from one another: tried, for no layer says
so.

Padding, the cut of a test set into batches and clients of unequal size in one stack leave the
results of such a network as they are. Normalisation by the batch at hand, a sort, softmax or
attention over the batch do not.
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

# examples of a batch, and of these in its first part; the second where it is cheap
_BATCH_CUTS = ((5, 3), (40, 33))
_CHEAP_FLOPS = 2e7  # FLOP of one example
_MANY_PARAMETERS = 2**24  # numbers of a network of which no copy in double precision is made
_OUTLIER_SCALE = 10.0  # how much larger the other examples are
# Of the largest number: kernels differ less, couplings more. In half precision both come close.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}


def couples_examples(model: Model, seed: int) -> bool:
    """Whether results change when batches are cut and padded, with weights at random around the
    initial ones: a gate that begins at zero must hide nothing. A network that refuses such batches
    counts as coupling them.
    """
    # what a network remembers of a pass is thrown away
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
        except Exception:  # a user's module may raise anything, and may know one precision only
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
    """``v`` with noise as large as it is, or as weights of its shape are; that of statistics is
    positive.
    """
    typical_size = v[0].numel() ** -0.5 if v.dim() > 1 and v.numel() else 1.0
    noise_size = max(typical_size, float(v.double().square().mean().sqrt())) if v.numel() else 0.0
    noise = (torch.randn(v.shape, generator=generator) * noise_size / 2).to(v.dtype)
    return v + (noise.abs() if positive else noise)


def _random_inputs(model: Model, size: int, cut: int, generator: Generator) -> Tensor:
    """Random inputs [size, *shape], larger from row ``cut`` on; texts are longer from there on."""
    if not model.tokens:
        x = torch.randn(size, *model.shape, generator=generator)
        return torch.cat([x[:cut], _OUTLIER_SCALE * x[cut:]])
    x = torch.randint(0, model.tokens, (size, *model.shape), generator=generator)
    length = model.shape[-1]
    lengths = torch.randint(1, max(2, length // 2 + 1), (size, 1), generator=generator)
    lengths[cut:] = length
    first = x[:, :1].clamp(min=min(1, model.tokens - 1))  # a text has a word
    return torch.cat([first, torch.where(torch.arange(1, length) < lengths, x[:, 1:], 0)], 1)


def _evaluation_couples(model: Model, tree: Tree, x: Tensor, cut: int, tolerance: float) -> bool:
    """Whether a batch as a whole gives something else than its parts."""
    run = _make_pass(model.eval_mode(), tree)
    (logits, _), (first, _), (second, _) = run(x), run(x[:cut]), run(x[cut:])
    return not _is_close(torch.cat([first, second]), logits, tolerance)


def _training_couples(model: Model, tree: Tree, x: Tensor, cut: int, tolerance: float) -> bool:
    """Whether padding changes the logits of the others or what is written to the leaves."""
    run, real = _make_pass(model, tree), torch.arange(len(x), device=x.device) < cut
    (alone, alone_leaves), (padded, padded_leaves) = run(x[:cut]), run(x, real)
    return not (
        _is_close(padded[:cut], alone, tolerance)
        and all(_is_close(padded_leaves[n], v, tolerance) for n, v in alone_leaves.items())
    )


def _make_pass(model: Model, tree: Tree) -> Callable[..., tuple[Tensor, Tree]]:
    """A function of inputs, of which some are real: the logits, and the leaves as they are
    afterwards.
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
    """Whether two tensors agree but for last bits, infinities and nan included."""
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(
        torch.where(finite, 0, a).nan_to_num(nan=1.0), torch.where(finite, 0, b).nan_to_num(nan=1.0)
    ):
        return False
    a, b = a[finite], b[finite]
    return not len(a) or float((a - b).abs().max()) <= tolerance * float(b.abs().max())
