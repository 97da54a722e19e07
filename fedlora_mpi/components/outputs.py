"""Mean outputs of each class, summed over clients, from which other clients learn.

z_kc [classes] is the mean output of client k over its samples of class c. The server sums it over
the clients of a round: the shared leaves are ``class.outputs`` [classes, classes], one row per
class, and ``class.holders`` [classes], how many clients hold the class. A client keeps its own z_k
as ``own.outputs``, of round ``own.round`` (counted from 1; 0: none yet).
"""

import torch
from torch import Tensor

from ..algorithm import Variables
from ..core.batch import Batch, mean
from ..core.names import method_leaf_name
from ..core.tree import Tree

_OWN_OUTPUTS, _OWN_ROUND = method_leaf_name("own", "outputs"), method_leaf_name("own", "round")
_OUTPUTS, _HOLDERS = method_leaf_name("class", "outputs"), method_leaf_name("class", "holders")


def no_outputs(classes: int) -> Variables:
    """Return a client's leaves before the first round."""
    zeros = torch.zeros(classes, classes)
    own = {_OWN_OUTPUTS: zeros, _OWN_ROUND: torch.zeros(1)}
    return Variables({_OUTPUTS: zeros, _HOLDERS: zeros[0]}, own)


def show_outputs(z: Tensor, counts: Tensor, round_: int) -> Variables:
    """Return a client's leaves after round ``round_``: z_k [classes, classes] to be summed, and to
    keep. ``counts``: its samples of each class.
    """
    own = {_OWN_OUTPUTS: z, _OWN_ROUND: torch.full_like(z[0, :1], round_ + 1)}
    return Variables({_OUTPUTS: z, _HOLDERS: (counts > 0).to(z)}, own)


def outputs_of_others(v: Variables, counts: Tensor, round_: int) -> tuple[Tensor, Tensor]:
    """Return the mean outputs of the other clients, [classes, classes], and how many other clients
    hold each class, [classes]. ``counts``: the client's own samples of each class.
    """
    # per class: 1 if the sums include this client, else 0
    is_own_included = ((v.personal[_OWN_ROUND] == round_) & (counts > 0)).to(counts)
    holders = v.shared[_HOLDERS] - is_own_included
    sums = v.shared[_OUTPUTS] - is_own_included[:, None] * v.personal[_OWN_OUTPUTS]
    return sums / holders.clamp(min=1)[:, None], holders


def distill(logits: Tensor, zhat: Tensor, holders: Tensor, batch: Batch) -> Tensor:
    """CE(zhat_y, softmax(logits)), the mean over all real examples. Examples whose class has no
    holder contribute zero.
    """
    example_losses = -(zhat[batch.y] * logits.log_softmax(1)).sum(1)
    return mean(torch.where(holders[batch.y] > 0, example_losses, 0), batch)


def held_numel(server: Tree, shared: Tree, round_: int) -> Tensor:
    """Return how many numbers the outputs of held classes have; a ``Transport.download_numel``."""
    return (shared[_HOLDERS] > 0).sum() * len(shared[_HOLDERS])
