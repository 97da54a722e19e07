"""The mean feature of each class: on a client, over all clients, and a loss that pulls to it.

Features z [d] are what enters the head. A client with n_i samples, of which a share pi_ik has class
k, shows h_ik = pi_ik mean_i(z | k) and pi_ik. Both are linear in the samples, so the quotient of
their means over clients, weighted by samples, is the mean over the samples of all clients:

    c_k = sum_i n_i h_ik / sum_i n_i pi_ik = sum_i n_ik mean_i(z | k) / sum_i n_ik

The means over clients are the shared leaves ``class.means`` [classes, d] and ``class.shares``
[classes], a client's own h_i is its personal leaf ``own.means`` [classes, d].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm import Variables
from ..core.batch import Batch, mean
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

MEANS, SHARES = method_leaf_name("class", "means"), method_leaf_name("class", "shares")
OWN_MEANS = method_leaf_name("own", "means")
_CHUNK = 250  # samples whose features are computed together


def feature_statistics(model: Model, weights: Tree, data: Batch) -> tuple[Tensor, Tensor]:
    """h_i = [pi_k mean(z | k)]_k [classes, d] and mean ||z||^2 [] over all samples of a client.

    In the model's mode: in evaluation mode a sample's features do not depend on its neighbours.
    """
    sums, energy = _class_sums(lambda x: model.features(weights, x), data)
    return sums / data.counts.sum(), energy / data.counts.sum()


def client_class_means(features: Callable[[Tensor], Tensor], data: Batch) -> Tensor:
    """[classes, m]: the mean of ``features(x)`` [B, m] over a client's samples of each class; zero
    for a class without samples.
    """
    sums, _ = _class_sums(features, data)
    return sums / data.counts.clamp(min=1)[:, None]


def _class_sums(features: Callable[[Tensor], Tensor], data: Batch) -> tuple[Tensor, Tensor]:
    """The sums of z = features(x) by class, [classes, m], and of ||z||^2, [], over a client's
    samples.
    """
    classes = len(data.counts)
    real = torch.ones_like(data.y) if data.real is None else data.real
    # [n, classes]
    one_hot = (data.y[:, None] == torch.arange(classes, device=data.y.device)) * real[:, None]
    sums: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    for x, class_mask, is_real in zip(
        data.x.split(_CHUNK), one_hot.split(_CHUNK), real.split(_CHUNK), strict=True
    ):
        z = features(x)
        sums = sums + class_mask.to(z).T @ z
        energy = energy + (z.square().sum(1) * is_real).sum()
    assert isinstance(sums, Tensor) and isinstance(energy, Tensor)  # of one sample and more
    return sums, energy


def class_statistics(model: Model, weights: Tree, data: Batch) -> Tree:
    """A client's part of ``class.means`` and ``class.shares``: h_i and pi_i."""
    means, _ = feature_statistics(model, weights, data)
    return {MEANS: means, SHARES: data.counts / data.counts.sum()}


def class_means(v: Variables, batch: Batch) -> Tensor:
    """c [classes, d]: over all clients, or the client's own mean where none had the class.

    Zero where the client has not had it either. Of ``batch`` only ``counts`` is read.
    """
    means, known = prototypes(v.shared)
    own_means = v.personal[OWN_MEANS] * batch.counts.sum() / batch.counts.clamp(min=1)[:, None]
    return torch.where(known[:, None], means, own_means)


def prototypes(shared: Tree) -> tuple[Tensor, Tensor]:
    """c [classes, d] over all clients, and which classes are known [classes]; the others' c is
    zero.
    """
    shares = shared[SHARES]
    return shared[MEANS] / shares.clamp(min=1e-30)[:, None], shares > 0


def prototype_loss(z: Tensor, means: Tensor, batch: Batch, known: Tensor | None = None) -> Tensor:
    """Mean over real examples and features of (z - c_y)^2, []; zero for an example whose class is
    not ``known``.

    z: [B, d]; means: c [classes, d]; known: [classes], None: all.
    """
    each = (z - means[batch.y]).square().mean(1)
    return mean(each if known is None else torch.where(known[batch.y], each, 0), batch)
