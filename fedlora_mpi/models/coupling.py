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
_CUTS = ((5, 3), (40, 33))
_CHEAP = 2e7  # FLOP of one example
_LARGE = 2**24  # numbers of a network of which no copy in double precision is made
_LOUD = 10.0  # how much larger the other examples are
# Of the largest number: kernels differ less, couplings more. In half precision both come close.
_NEAR = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}


def couples(model: Model, seed: int) -> bool:
    """Whether results change when batches are cut and padded, with weights at random around the
    initial ones: a gate that begins at zero must hide nothing. A network that refuses such batches
    counts as coupling them.
    """
    # what a network remembers of a pass is thrown away
    apart = replace(model, modules=copy.deepcopy(model.modules))
    large = sum(v.numel() for v in model.initial.values()) > _LARGE
    as_it_is = min(
        (v.dtype for v in model.initial.values()),
        key=lambda dtype: dtype.itemsize,
        default=torch.float32,
    )
    for dtype in (
        (as_it_is,) if large or as_it_is != torch.float32 else (torch.float64, torch.float32)
    ):
        try:
            return _tried(apart, seed, dtype)
        except Exception:  # a user's module may raise anything, and may know one precision only
            continue
    return True


@torch.no_grad()
def _tried(model: Model, seed: int, dtype: torch.dtype) -> bool:
    generator = rng(seed, "coupling")
    tree = {n: _moved(v, model.role(n) == "stats", generator) for n, v in model.initial.items()}
    if dtype == torch.float64:
        tree = {n: v.double() for n, v in tree.items()}
    for whole, part in _CUTS[: 2 if model.flops < _CHEAP else 1]:
        x = _inputs(model, whole, part, generator)
        x = x.double() if x.is_floating_point() and dtype == torch.float64 else x
        if any(changes(model, tree, x, part, _NEAR[dtype]) for changes in (_evaluated, _trained)):
            return True
    return False


def _moved(v: Tensor, positive: bool, generator: Generator) -> Tensor:
    """``v`` with noise as large as it is, or as weights of its shape are; that of statistics is
    positive.
    """
    usual = v[0].numel() ** -0.5 if v.dim() > 1 and v.numel() else 1.0
    size = max(usual, float(v.double().square().mean().sqrt())) if v.numel() else 0.0
    noise = (torch.randn(v.shape, generator=generator) * size / 2).to(v.dtype)
    return v + (noise.abs() if positive else noise)


def _inputs(model: Model, whole: int, part: int, generator: Generator) -> Tensor:
    """Inputs at random, [whole, *shape], which are larger from ``part`` on; of texts, longer."""
    if not model.tokens:
        x = torch.randn(whole, *model.shape, generator=generator)
        return torch.cat([x[:part], _LOUD * x[part:]])
    x = torch.randint(0, model.tokens, (whole, *model.shape), generator=generator)
    length = model.shape[-1]
    ends = torch.randint(1, max(2, length // 2 + 1), (whole, 1), generator=generator)
    ends[part:] = length
    first = x[:, :1].clamp(min=min(1, model.tokens - 1))  # a text has a word
    return torch.cat([first, torch.where(torch.arange(1, length) < ends, x[:, 1:], 0)], 1)


def _evaluated(model: Model, tree: Tree, x: Tensor, part: int, near: float) -> bool:
    """Whether a batch as a whole gives something else than its parts."""
    run = _pass(model.evaluating(), tree)
    (logits, _), (first, _), (second, _) = run(x), run(x[:part]), run(x[part:])
    return not _alike(torch.cat([first, second]), logits, near)


def _trained(model: Model, tree: Tree, x: Tensor, part: int, near: float) -> bool:
    """Whether padding changes the logits of the others or what is written to the leaves."""
    run, real = _pass(model, tree), torch.arange(len(x), device=x.device) < part
    (alone, after), (padded, after_padded) = run(x[:part]), run(x, real)
    return not (
        _alike(padded[:part], alone, near)
        and all(_alike(after_padded[n], v, near) for n, v in after.items())
    )


def _pass(model: Model, tree: Tree) -> Callable[..., tuple[Tensor, Tree]]:
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
        with model.prepared(batch):
            return model(leaves, x), leaves

    return run


def _alike(a: Tensor, b: Tensor, near: float) -> bool:
    """Whether two tensors agree but for last bits, infinities and nan included."""
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(
        torch.where(finite, 0, a).nan_to_num(nan=1.0), torch.where(finite, 0, b).nan_to_num(nan=1.0)
    ):
        return False
    a, b = a[finite], b[finite]
    return not len(a) or float((a - b).abs().max()) <= near * float(b.abs().max())
