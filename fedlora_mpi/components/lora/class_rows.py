"""A classifier whose rows belong to classes: which were seen, and which a client owns.

For each leaf [classes, ...] of the classifier, the leaf "seen.<leaf>" [classes] is 1 for the rows
that count in the softmax, and "own.<leaf>" [classes] is 1 for those that the client trains.
"""

import torch
from torch import Tensor

from ...algorithm import Batch, Variables
from ...core.names import is_factor, method_leaf_name
from ...core.tree import Tree, select_prefix
from ...models.network import Model

SEEN, OWN = method_leaf_name("seen"), method_leaf_name("own")


def check_rows(name: str, model: Model) -> None:
    """Raise ValueError if the head of ``model`` has a leaf without a row for each class.

    name: of the method.
    """
    for leaf_name, leaf in model.leaves.items():
        if leaf.role == "head" and leaf.shape[:1] != (model.classes,):
            raise ValueError(
                f"name = {name}: needs a head with a row for each class; {leaf_name} is "
                f"{list(leaf.shape)}"
            )


def mark_own_classes(start: Variables, now: Variables, data: Batch) -> Variables:
    """The client owns the classes of its samples, and they count as seen for it."""
    shared, own = now.shared, (data.counts > 0).to(data.counts)
    for n, seen in select_prefix(now.shared, SEEN).items():
        shared = shared | {OWN + n: own, SEEN + n: torch.maximum(seen, own)}
    return now._replace(shared=shared)


def keep_other_rows(trained: Tree, shared: Tree) -> Tree:
    """The leaves of the classifier, those rows as in ``shared`` that the client does not own."""
    return {
        n: torch.where(_broadcast_rows(own, shared[n]) > 0, trained[n], shared[n])
        for n, own in select_prefix(trained, OWN).items()
    }


def mean_of_owners(mean: Tree, shared: Tree) -> Tree:
    """The classifier whose rows are the means over their owners, and which classes were seen.

    mean: the mean of all clients' leaves after ``keep_other_rows``.
    """
    tree = {}
    for n, owners in select_prefix(mean, OWN).items():
        p = _broadcast_rows(owners, shared[n])  # total weight of each row's owners
        # remove the unchanged rows of the other clients from the mean
        moved = (mean[n] - (1 - p) * shared[n]) / p
        tree[n] = torch.where(p > 0, moved, shared[n])
        tree[SEEN + n] = torch.where(owners > 0, 1, shared[SEEN + n])
    return tree


def mask_unseen(logits: Tensor, shared: Tree) -> Tensor:
    """``logits`` [B, classes] with the softmax over the seen classes; over all while none is."""
    # the mask is the same for all leaves of the classifier
    for seen in list(select_prefix(shared, SEEN).values())[:1]:
        # at most e^-100 of the softmax; finite, so the loss is finite if the label is masked
        floor = logits.detach().amin(1, keepdim=True) - 100
        logits = torch.where((seen > 0) | (seen == 0).all(), logits, floor)
    return logits


def marked_numel(tree: Tree, marks: str) -> int:
    """How many numbers of ``tree`` are sent: all except W and the marks; of the classifier only the
    rows that the leaves ``marks`` mark.
    """
    marked, total = select_prefix(tree, marks), 0
    for n, v in tree.items():
        if not n.startswith((OWN, SEEN)) and not is_factor(n, "W"):
            total += int(marked[n].sum()) * v[0].numel() if n in marked else v.numel()
    return total


def _broadcast_rows(row_values: Tensor, leaf: Tensor) -> Tensor:
    """Reshape [classes] so that it multiplies ``leaf`` [classes, ...] row by row."""
    return row_values.view(-1, *[1] * (leaf.dim() - 1))
