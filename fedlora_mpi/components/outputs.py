"""Outputs of each class, summed over clients, from which other clients learn.

z_kc [classes] is an output that client k has for class c, and a_kc its weight. The server sums
both over the clients of a round. The shared leaves are ``class.outputs`` [classes, classes], the
sum of a_kc z_kc, one row per class, and ``class.holders`` [classes], the sum of a_kc. A client
keeps its own a_k z_k as ``own.outputs``, of round ``own.round`` (counted from 1; 0: none yet).

With the weights 1 and 0, ``class.holders`` counts the clients that hold a class.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm import Variables
from ..core.batch import Batch, mean, one_hot
from ..core.names import method_leaf_name
from ..core.tree import Tree
from .prototypes import CHUNK

_OWN_OUTPUTS, _OWN_ROUND = method_leaf_name("own", "outputs"), method_leaf_name("own", "round")
_OUTPUTS, _HOLDERS = method_leaf_name("class", "outputs"), method_leaf_name("class", "holders")


def no_outputs(classes: int) -> Variables:
    """Return a client's leaves before the first round."""
    zeros = torch.zeros(classes, classes)
    own = {_OWN_OUTPUTS: zeros, _OWN_ROUND: torch.zeros(1)}
    return Variables({_OUTPUTS: zeros, _HOLDERS: zeros[0]}, own)


def show_outputs(weighted_z: Tensor, weights: Tensor, round_: int) -> Variables:
    """Return a client's leaves after round ``round_``: a_kc z_kc [classes, classes] to be summed,
    and to keep. ``weights``: a_k [classes].
    """
    own_round = torch.full_like(weights[:1], round_ + 1)
    own = {_OWN_OUTPUTS: weighted_z, _OWN_ROUND: own_round}
    return Variables({_OUTPUTS: weighted_z, _HOLDERS: weights}, own)


def correct_outputs(logits: Callable[[Tensor], Tensor], data: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of the logits over a client's samples of each class that it classifies
    correctly, [classes, classes], and how many these are, [classes].

    logits: inputs x -> [B, classes].
    """
    z = torch.cat([logits(x) for x in data.x.split(CHUNK)])
    z = z.float() if z.dtype.itemsize < 4 else z  # a sum in half precision would be too coarse
    is_correct = one_hot(data) & (z.argmax(1) == data.y)[:, None]  # [B, classes]
    return is_correct.to(z).T @ z, is_correct.sum(0).to(z)


def own_outputs(v: Variables, weights: Tensor) -> Tensor:
    """Return z_k of a client's last round, [classes, classes]; zero for a class of weight 0."""
    return v.personal[_OWN_OUTPUTS] / weights.clamp(min=1)[:, None]


def outputs_of_others(v: Variables, weights: Tensor, round_: int) -> tuple[Tensor, Tensor]:
    """Return the mean outputs of the other clients, [classes, classes], and the sum of their
    weights of each class, [classes]. ``weights``: a_k of the client's own last round; weights are
    whole numbers.
    """
    # per class: a_k if the sums include this client, else 0
    included_weights = (v.personal[_OWN_ROUND] == round_) * weights
    holders = v.shared[_HOLDERS] - included_weights
    own_sums = (included_weights > 0)[:, None] * v.personal[_OWN_OUTPUTS]
    return (v.shared[_OUTPUTS] - own_sums) / holders.clamp(min=1)[:, None], holders


def distill(logits: Tensor, zhat: Tensor, holders: Tensor, batch: Batch) -> Tensor:
    """CE(zhat_y, softmax(logits)), a ``mean_of_held``."""
    return mean_of_held(-(zhat[batch.y] * logits.log_softmax(1)).sum(1), holders, batch)


def mean_of_held(each: Tensor, holders: Tensor, batch: Batch) -> Tensor:
    """The mean of ``each`` [B] over all real examples. Examples whose class has no holder
    contribute zero.
    """
    return mean(torch.where(holders[batch.y] > 0, each, 0), batch)


def held_numel(server: Tree, shared: Tree, round_: int) -> Tensor:
    """Return how many numbers the outputs of held classes have; a ``Transport.download_numel``."""
    return (shared[_HOLDERS] > 0).sum() * len(shared[_HOLDERS])
