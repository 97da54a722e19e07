"""The mean and the spread of the features of each class, from which features can be drawn.

Features h [...] are the output of one module for one example, in whatever shape. The shared leaves
are "feature.means" [classes, ...] and "feature.spreads" [classes, ...], entry by entry.
"""

from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import Term, Upload
from ..core.batch import Batch
from ..core.names import method_leaf_name
from ..core.seeds import derive_key, isolate_rng, normal
from ..core.tree import Tree
from ..models.network import Model
from .lowrank import join_first

MEANS, SPREADS = method_leaf_name("feature", "means"), method_leaf_name("feature", "spreads")
# what a spread is: a variance, or a standard deviation of at most ``LARGEST_DEVIATION``
Spread = Literal["variance", "deviation"]
LARGEST_DEVIATION = 0.1
_NOISE = derive_key(0, "features")  # apart from the noise of dropout


def feature_shape(model: Model, place: str) -> tuple[int, ...]:
    """Return the shape of one example's features, the output of the module ``place``; "": what
    enters the head.

    Raises ValueError if the network has no such module, or if it has no batch of features.
    """
    names = [n for n, _ in model.modules[False].named_modules() if n]
    if place and place not in names:
        raise ValueError(
            f"split = {place}: is no module of the network; there are {join_first(names)}"
        )
    if not place and not model.head:
        raise ValueError("split = : the network has no head at its end; name a module of it")
    shapes = []

    def look(h: Tensor) -> Tensor:
        shapes.append(tuple(h.shape))
        return h

    with torch.no_grad(), isolate_rng(0, "trial"):
        model.eval_mode().replace_output(model.initial, model.zero_inputs(2), place, look)
    if len(shapes) != 1 or shapes[0][0] != 2:
        raise ValueError(f"split = {place}: must be called once in a pass, on the whole batch")
    return shapes[0][1:]


def first_moments(model: Model, place: str, spread: Spread, rng: Generator) -> Tree:
    """Return the leaves before round 1: means from U[0, 1), standard deviations of 0.1."""
    means = torch.rand(model.classes, *feature_shape(model, place), generator=rng)
    deviations = torch.full_like(means, 0.1)
    return {MEANS: means, SPREADS: deviations if spread == "deviation" else deviations.square()}


def draw_features(shared: Tree, y: Tensor, key: Tensor, spread: Spread) -> Tensor:
    """Return features [B, ...] of the classes y [B], drawn from the moments in ``shared``."""
    means, spreads = shared[MEANS][y], shared[SPREADS][y]
    deviations = spreads if spread == "deviation" else spreads.sqrt()
    return means + deviations * normal(key + _NOISE, tuple(means.shape)).to(means)


@torch.no_grad()
def follow_features(shared: Tree, h: Tensor, batch: Batch, beta: float, spread: Spread) -> None:
    """Move the leaves in ``shared`` towards the moments of features h [B, ...] of a batch, in place
    as BatchNorm moves its statistics: new = beta old + (1 - beta) moment of the batch.

    A class that the batch lacks stays. A standard deviation needs two samples of the class.
    """
    means, spreads = shared[MEANS], shared[SPREADS]
    real = torch.ones_like(batch.y) if batch.real is None else batch.real
    classes = torch.arange(len(means), device=h.device)
    one_hot = ((batch.y[:, None] == classes) & (real[:, None] > 0)).to(means)  # [B, classes]
    flat = torch.where(real[:, None] > 0, h.flatten(1).to(means), 0)
    counts = one_hot.sum(0)[:, None]  # [classes, 1]
    batch_means = one_hot.T @ flat / counts.clamp(min=1)
    squares = one_hot.T @ (flat - batch_means[batch.y]).square()
    if spread == "variance":
        batch_spreads, needed = squares / counts.clamp(min=1), 1
    else:
        deviations = (squares / (counts - 1).clamp(min=1)).sqrt()
        batch_spreads, needed = deviations.clamp(max=LARGEST_DEVIATION), 2
    for leaf, moment, least in ((means, batch_means, 1), (spreads, batch_spreads, needed)):
        old = leaf.flatten(1)
        new = torch.where(counts >= least, torch.lerp(moment, old, beta), old)
        leaf.copy_(new.view(leaf.shape))


def weigh_moments_alike(upload: Upload, shared: Tree, weight: int) -> Term:
    """A ``Transport.expand``: clients count equally in the mean of the moments."""
    one = upload.mean[MEANS].new_ones(())
    return Term(upload.mean, weights={MEANS: one, SPREADS: one})
