"""Prototypes, the mean feature of each class on a client and over all clients, and their loss.

Features z [d] are the inputs of the head. Client i has n_i samples, and the share pi_ik of them has
class k. It uploads h_ik = pi_ik mean_i(z | k) and pi_ik. Both are linear in the samples. So the
quotient of their means over clients, weighted by samples, is the mean over the samples of all
clients:

    c_k = sum_i n_i h_ik / sum_i n_i pi_ik = sum_i n_ik mean_i(z | k) / sum_i n_ik

The means over clients are the shared leaves ``class.means`` [classes, d] and ``class.shares``
[classes]. A client's own h_i is its personal leaf ``own.means`` [classes, d], and the variance of
its entries, V_i = (mean ||z||^2 - ||h_i||^2) / n_i, is ``own.variance`` [1].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm import Variables
from ..core.batch import Batch, cross_entropy, mean, one_hot
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

MEANS, SHARES = method_leaf_name("class", "means"), method_leaf_name("class", "shares")
OWN_MEANS, OWN_VARIANCE = method_leaf_name("own", "means"), method_leaf_name("own", "variance")
CHUNK = 250  # samples whose features are computed together


def check_features(name: str, model: Model) -> None:
    """Raise ValueError if ``model`` has no features, for the method of this ``name``."""
    if not (model.head and model.ends_in_linear):
        raise ValueError(
            f"name = {name}: needs a network with a body and a Linear classifier at its end"
        )


def no_prototypes(model: Model) -> Tree:
    """Return ``class.means`` and ``class.shares`` before the first round."""
    means = torch.zeros(model.all_leaves[f"{model.head}.weight"].shape)  # [classes, d]
    return {MEANS: means, SHARES: means[:, 0]}


def feature_statistics(model: Model, weights: Tree, data: Batch) -> tuple[Tensor, Tensor]:
    """Return h_i = [pi_k mean(z | k)]_k [classes, d] and mean ||z||^2 [] over a client's samples.

    Features are computed in the model's mode. In evaluation mode a sample's features do not depend
    on the rest of its batch.
    """
    sums, energy = _class_sums(lambda x: model.features(weights, x), data)
    return sums / data.counts.sum(), energy / data.counts.sum()


def client_class_means(features: Callable[[Tensor], Tensor], data: Batch) -> Tensor:
    """Return the mean of ``features(x)`` over a client's samples of each class, [classes, m].

    features: inputs x -> [B, m]. The mean of a class without samples is zero.
    """
    sums, _ = _class_sums(features, data)
    return sums / data.counts.clamp(min=1)[:, None]


def _class_sums(features: Callable[[Tensor], Tensor], data: Batch) -> tuple[Tensor, Tensor]:
    """Return two sums over a client's samples, with z = features(x).

    These are the sums of z by class, [classes, m], and of ||z||^2, [].
    """
    real = torch.ones_like(data.y) if data.real is None else data.real
    sums: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    for x, class_mask, is_real in zip(
        data.x.split(CHUNK), one_hot(data).split(CHUNK), real.split(CHUNK), strict=True
    ):
        z = features(x)
        sums = sums + class_mask.to(z).T @ z
        energy = energy + (z.square().sum(1) * is_real).sum()
    assert isinstance(sums, Tensor) and isinstance(energy, Tensor)  # there is a sample
    return sums, energy


def class_statistics(model: Model, weights: Tree, data: Batch) -> Tree:
    """Return a client's part of ``class.means`` and ``class.shares``: h_i and pi_i."""
    means, _ = feature_statistics(model, weights, data)
    return {MEANS: means, SHARES: data.counts / data.counts.sum()}


def own_statistics(model: Model, weights: Tree, data: Batch) -> Tree:
    """Return a client's ``own.means`` and ``own.variance``: h_i and V_i."""
    h, energy = feature_statistics(model, weights, data)
    variance = ((energy - h.square().sum()).clamp(min=0) / data.counts.sum())[None]
    return {OWN_MEANS: h, OWN_VARIANCE: variance}


def class_means(v: Variables, batch: Batch) -> Tensor:
    """Return c [classes, d]: the mean over all clients, or else the client's own mean.

    The client's own mean is used for a class that is not known (see ``prototypes``). It is zero if
    the client has not had the class either. Of ``batch`` only ``counts`` is read.
    """
    means, known = prototypes(v.shared)
    own_means = v.personal[OWN_MEANS] * batch.counts.sum() / batch.counts.clamp(min=1)[:, None]
    return torch.where(known[:, None], means, own_means)


def prototypes(shared: Tree) -> tuple[Tensor, Tensor]:
    """Return c [classes, d] over all clients, and which classes are known, [classes] bool.

    c of an unknown class is zero.
    """
    shares = shared[SHARES]
    return shared[MEANS] / shares.clamp(min=1e-30)[:, None], shares > 0


def known_numel(server: Tree, shared: Tree, round_: int) -> Tensor:
    """Return how many numbers the prototypes of known classes have; a ``download_numel``."""
    return (shared[SHARES] > 0).sum() * shared[MEANS].shape[1]


def prototype_loss(z: Tensor, means: Tensor, batch: Batch, known: Tensor | None = None) -> Tensor:
    """Return the mean of (z - c_y)^2 over real examples and features, [].

    An example whose class is not ``known`` counts as zero. z: [B, d]; means: c [classes, d]; known:
    [classes], None: all.
    """
    each = (z - means[batch.y]).square().mean(1)
    return mean(each if known is None else torch.where(known[batch.y], each, 0), batch)


def aligned_loss(
    model: Model, w: Tree, batch: Batch, lam: float, means: Tensor, known: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy plus ``lam`` times the prototype loss of a network with leaves w."""
    z = model.features(w, batch.x)
    fit = cross_entropy(model.classify(w, z), batch)
    return fit + lam * prototype_loss(z, means, batch, known) if lam else fit


def nearest_scores(z: Tensor, shared: Tree, own: Tensor | None) -> Tensor:
    """Return scores [B, classes], the highest for the class of the nearest prototype.

    The candidates are the known classes that are among ``own`` [classes], or all known ones if none
    is or ``own`` is None. Scores are -mean_d (z - c)^2 without the term of z alone, which is the
    same for all classes. z: [B, d].
    """
    means, known = prototypes(shared)
    own_known = known if own is None else known & own
    candidates = torch.where(own_known.any(), own_known, known)
    scores = (2 * z @ means.T - means.square().sum(1)) / means.shape[1]
    return torch.where(candidates, scores, scores.amin(1, keepdim=True) - 100)
