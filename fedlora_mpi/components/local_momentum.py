"""Local SGD along a recursive estimate of the gradient (STORM; Cutkosky and Orabona 2019).

    v   =  g(w; B) + a (v' - g(w'; B))      w' and v': of the step before; first v = g(w; B)
    w  <-  w - lr v

g is the gradient of a loss on the batch B, with the same noise at both points. Weight decay is part
of it. As v' = (w' - w) / lr, v is not stored. A trajectory has the shared leaves
"<prefix><parameter>", which are w. With a > 0 the client also has "last.<prefix><parameter>", which
are w', and "begun.<prefix>" [], which is 0 before the first step and 1 after it.
"""

import torch
from torch import Tensor

from ..algorithm import Batch, LocalTraining, Loss, Step, Variables
from ..core.names import method_leaf_name
from ..core.tree import Tree
from ..models.network import Model

_LAST, _BEGUN = method_leaf_name("last"), method_leaf_name("begun")


def begin(w: Tree, prefix: str) -> Tree:
    """Return the further leaves before the first step; w: {parameter: where it starts}."""
    last = {_LAST + prefix + n: v for n, v in w.items()}
    return last | {_BEGUN + prefix: next(iter(w.values())).new_zeros(())}


def momentum_step(
    model: Model, base_loss: Loss, train: LocalTraining, a: float, prefix: str
) -> Step:
    """Return the step of one trajectory. Only that without a prefix moves running statistics."""
    parameters = [n for n in model.leaves if model.role(n) != "stats"]

    def loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
        def value_at(w: Tree) -> Tensor:
            tree = model.copy_statistics(now.shared | w)
            return base_loss(now._replace(shared=tree), start, batch)

        w = {n: now.shared[prefix + n] for n in parameters}
        value = value_at(w) if prefix else base_loss(now, start, batch)
        return value + recursion(w, value_at, now.shared, batch) if a else value

    def recursion(w: Tree, value_at, shared: Tree, batch: Batch) -> Tensor:
        """A term of value 0 whose gradients set w' to w, and add a (v' - g(w'; B)) to that of w."""

        def noisy_value_at(point: Tree) -> Tensor:
            with model.training_context(batch):
                return value_at(point)

        last = {n: shared[_LAST + prefix + n] for n in parameters}
        begun = shared[_BEGUN + prefix]
        g = torch.func.grad(noisy_value_at)({n: v.detach() for n, v in last.items()})
        term = _with_gradient((begun - 1) / train.lr - train.weight_decay * begun, begun)
        for n in parameters:
            # v' without weight decay, which SGD adds for w' as for w
            v = (last[n] - w[n]) / train.lr - train.weight_decay * last[n]
            term = term + _with_gradient(v, last[n]) + _with_gradient(a * begun * (v - g[n]), w[n])
        return term

    trained = {prefix + n for n in parameters}
    if a:
        trained |= {_LAST + n for n in trained} | {_BEGUN + prefix}
    return Step(loss, trained.__contains__)


def _with_gradient(gradient: Tensor, leaf: Tensor) -> Tensor:
    """Return 0, [], with this gradient with respect to ``leaf``."""
    return (gradient.detach() * (leaf - leaf.detach())).sum()
