"""A network as a pure function of a tree, with the role of every leaf.

Roles come from module TYPES and from what a forward pass does, never from names: ``norm`` and
``stats`` are the parameters and the running statistics of normalisation layers, ``head`` is the
classifier (the last product with a weight on the way to the logits, see ``watching.py``), ``body``
is the rest. Integer buffers are constants: they belong to no client and never travel. So are
parameters that the builder has frozen (``requires_grad`` is False): they stay as they are, whatever
the method.

A parameter or buffer in several places (tied weights) is one leaf, with the name and the role of
the first; it is ``body`` where any of them is outside of the classifier.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from ..core.batch import Batch
from ..core.escapes import brief
from ..core.seeds import isolated
from ..core.tree import Tree
from .counting import of_forward
from .effects import Effects
from .matrices import matrix_of, why_none
from .purity import check_function, effects, inputs
from .substitutes import Substitutes
from .ties import find_places, find_ties, tensors, tie
from .unwrapping import duplicate, refusing, unmade, unwrap
from .watching import Matrix, Watched, owner_of, watch

Role = Literal["body", "head", "norm", "stats"]
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


class Leaf(NamedTuple):
    """What is known of a leaf beside its value."""

    shape: tuple[int, ...]
    role: Role
    matrix: Matrix  # how a low-rank part reads it; "" when it has none


@dataclass(frozen=True)
class Model:
    """``model(tree, x)``: logits [B, classes] of the network whose leaves are ``tree``.

    In training mode BatchNorm writes its running statistics into the ``stats`` leaves it is given.
    ``flops`` counts one forward pass of one sample (a multiply-add is 2).
    """

    leaves: dict[str, Leaf]
    initial: Tree
    constants: Tree
    # the frozen ones among the constants, as a low-rank part beside them has to know them
    locked: dict[str, Leaf]
    shape: tuple[int, ...]  # of one input, without the batch axis
    tokens: int  # inputs are integers below it; 0: they are floats
    classes: int
    flops: int
    batch_statistics: bool  # some layer normalises by the statistics of its batch
    noisy: bool  # some layer draws random numbers in training
    training: bool
    modules: tuple[nn.Module, nn.Module]  # the skeleton in evaluation and in training mode
    bodies: tuple[nn.Module, nn.Module]  # the same with an identity for a head
    # name of the classifier among the modules; "" where there is none, or where it is the network
    head: str
    ties: dict[str, str]  # further names of leaves and constants that have several places
    places: tuple[dict[str, str], ...]  # {name there: leaf} of the network, its body and its head
    effects: Effects = Effects()  # of a pass, beside its logits and BatchNorm's statistics
    # what it makes of an example depends on the others of the batch, padding among them
    couples: bool = False
    # features [B, width] enter one plain Linear, the head, and what that makes are the logits
    ends_in_linear: bool = False

    def __call__(self, tree: Tree, x: Tensor) -> Tensor:
        return self._call(self.modules[self.training], self.places[0], tree, x, self.effects)

    def features(self, tree: Tree, x: Tensor) -> Tensor:
        """What enters the head, [B, width]; needs no leaf of the head."""
        return self._call(self.bodies[self.training], self.places[1], tree, x, self.effects)

    def classify(self, tree: Tree, z: Tensor) -> Tensor:
        """The head on features [B, width]: logits [B, classes]; needs only leaves of the head.

        ``model(tree, x)`` equals ``classify(tree, features(tree, x))`` where the head comes last.
        """
        head = self.modules[self.training].get_submodule(self.head)
        return self._call(head, self.places[2], tree, z, self.effects.within(self.head))

    def _call(
        self, module: nn.Module, places: dict[str, str], tree: Tree, x: Tensor, effects: Effects
    ) -> Tensor:
        """``module`` with its leaves from ``tree``. Raises ValueError for one that is not there:
        the skeleton has none.
        """
        values = {**self.constants, **tree}
        try:
            given = {place: values[leaf] for place, leaf in places.items()}
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]} of the network has no value: what a method's weights_of returns "
                "must hold every leaf of model.leaves"
            ) from None
        if effects == Effects():
            return functional_call(module, given, (x,))
        return effects.call(module, given, x, self.training)

    def zeros(self, samples: int) -> Tensor:
        """Inputs that say nothing, [samples, *shape]."""
        return _zeros(samples, self.shape, self.tokens)

    def prepared(self, batch: Batch) -> AbstractContextManager:
        """What training passes on a mini-batch of one client run under: Substitutes, where padding,
        a single example or random layers need them.
        """
        odd = batch.real is not None or len(batch.y) == 1  # padded, or too small for BatchNorm
        needed = self.noisy or (odd and self.batch_statistics)
        return Substitutes(batch.real, batch.key) if needed else nullcontext()

    def judged(self, batch: Batch) -> AbstractContextManager:
        """What the evaluation of a mini-batch of one client runs under: Substitutes, where a batch
        of one example has to be normalised by itself.
        """
        return Substitutes(batch.real, batch.key) if self.couples else nullcontext()

    def frozen(self, tree: Tree) -> Tree:
        """``tree`` detached, its statistics copied: for a forward pass that must leave no trace,
        such as a teacher's.
        """
        return {n: v.detach().clone() if self._written(n) else v.detach() for n, v in tree.items()}

    def traceless(self, tree: Tree) -> Tree:
        """``tree`` with its statistics copied: for a further forward pass that trains, too."""
        return {n: v.clone() if self._written(n) else v for n, v in tree.items()}

    def _written(self, leaf: str) -> bool:
        return self.role(leaf) == "stats" or leaf in self.effects.parameters

    def evaluating(self) -> "Model":
        """The same network in evaluation mode."""
        return replace(self, training=False)

    @cached_property
    def fixed(self) -> "Model":
        """The same network, whose BatchNorm takes its running statistics as they are, in training
        too.
        """
        training = copy.deepcopy(self.modules[True]), copy.deepcopy(self.bodies[True])
        for layer in (layer for module in training for layer in module.modules()):
            if isinstance(layer, _NormBase):
                layer.eval()
        modules, bodies = (
            (half[False], fixed)
            for half, fixed in zip((self.modules, self.bodies), training, strict=True)
        )
        return replace(self, batch_statistics=False, modules=modules, bodies=bodies)

    def to(self, device: torch.device) -> "Model":
        """The same network with its initial weights and constants on ``device``."""
        initial, constants = (
            {n: v.to(device) for n, v in tree.items()} for tree in (self.initial, self.constants)
        )
        return replace(self, initial=initial, constants=constants)

    def role(self, leaf: str) -> Role | None:
        """Role of a leaf; None for names that are not the network's (an algorithm's own)."""
        return self.leaves[leaf].role if leaf in self.leaves else None

    @property
    def described(self) -> dict[str, Leaf]:
        """``leaves`` and the frozen ones."""
        return self.leaves | self.locked

    @property
    def values(self) -> Tree:
        """``initial`` and the frozen ones."""
        return self.initial | {n: self.constants[n] for n in self.locked}

    def why_none(self, leaf: str) -> str:
        """Why a leaf, or a frozen one, is read as no matrix; "" where it is."""
        shape, role, matrix = self.described[leaf]
        return "" if matrix else why_none(self.modules[False], leaf, shape, role)

    def module(self, tree: Tree) -> nn.Module:
        """An ordinary nn.Module in evaluation mode that holds a copy of ``tree``."""
        module = tie(copy.deepcopy(self.modules[False]).to_empty(device="cpu"), self.ties)
        values = {**self.constants, **tree}
        for name, place in tensors(module).items():
            place.data.copy_(values[name])
        return module


def from_module(module: nn.Module, classes: int, shape: tuple[int, ...], tokens: int = 0) -> Model:
    """The model of ``module``, whose present parameters become the initial values.

    ``shape``: of one input, without the batch axis; ``tokens``: as in ``Model``. Raises ValueError
    when the module does not map [B, *shape] to [B, classes], counts batches instead of using a
    momentum, has a parameter that cannot be trained, or is not a function of its parameters,
    buffers and inputs (see ``purity``).
    """
    module, zeros = unwrap(module), _zeros(2, shape, tokens)
    _make(module, zeros)
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            if layer.momentum is None:
                raise ValueError(f"name: layer {name} has momentum None (a cumulative average)")
            layer.num_batches_tracked = None
    traits = _trial(duplicate(module), classes, zeros)
    x, other = inputs(module, zeros, tokens)
    found, ties = effects(module, x, other), find_ties(module)
    watched = watch(module, zeros, classes)
    leaves, locked, initial, constants = _leaves(module, watched)
    skeleton = tie(copy.deepcopy(module).to("meta"), ties)
    head = watched.head
    modules = (skeleton.eval(), copy.deepcopy(skeleton).train())
    bodies = tuple(_beheaded(copy.deepcopy(m), head) for m in modules)
    model = Model(
        leaves,
        initial,
        constants,
        locked,
        tuple(shape),
        tokens,
        classes,
        **traits,
        training=True,
        modules=modules,
        bodies=bodies,
        head=head,
        ties=ties,
        places=find_places(modules[0], bodies[0], head, ties),
        effects=found,
    )
    check_function(module, model, x)
    return replace(model, ends_in_linear=_ends_in_linear(model, x))


def _ends_in_linear(model: Model, x: Tensor) -> bool:
    """What ``Model.ends_in_linear`` says, tried on inputs x."""
    head, above = (
        model.modules[False].get_submodule(model.head),
        f"{model.head}." if model.head else "",
    )
    mine = {n for n, leaf in model.described.items() if leaf.role == "head"}
    if not isinstance(head, nn.Linear) or not {f"{above}weight"} <= mine <= {
        f"{above}weight",
        f"{above}bias",
    }:
        return False
    judged, tree = model.evaluating(), model.frozen(model.initial)
    with torch.no_grad(), isolated(0, "trial"), Substitutes(None, torch.tensor(0)):
        try:
            z = judged.features(tree, x.clone())
            return z.dim() == 2 and torch.allclose(
                judged.classify(tree, z), judged(tree, x.clone()), 1e-4, 1e-5, True
            )
        except (RuntimeError, AttributeError, ValueError):
            # the network does more with its head than to call it
            return False


def _make(module: nn.Module, zeros: Tensor) -> None:
    """Let a network that makes layers in its first pass (LazyLinear, or its own ``hasattr``) make
    them.

    Raises ValueError where it refuses such inputs, or a copy of it does.
    """
    with torch.no_grad():
        if not unmade(module):
            twin = duplicate(module)
            try:
                with isolated(0, "trial"):
                    twin.eval()(zeros)
            except Exception as error:
                with refusing(zeros.shape[1:]):
                    module.eval()(zeros)
                raise ValueError(
                    f"name: a copy of the model fails where the model does not: {brief(error)}; a "
                    "hook or function made in __init__ holds the model or what is its own; make it "
                    "a method"
                ) from error
            if len(list(twin.parameters())) == len(list(module.parameters())):
                return
        with refusing(zeros.shape[1:]):
            module.eval()(zeros)


def _beheaded(module: nn.Module, head: str) -> nn.Module:
    """``module`` with an identity in the place of its head."""
    if not head:  # the module is its own head
        return nn.Identity()
    same, empty = module.get_submodule(head), nn.Identity()
    for name in [n for n, m in module.named_modules(remove_duplicate=False) if m is same]:
        module.set_submodule(name, empty)
    return module


def _zeros(samples: int, shape: tuple[int, ...], tokens: int) -> Tensor:
    # words one after the other: a text of padding alone has no length, which packed sequences
    # refuse
    if tokens:
        return (torch.arange(1, 1 + shape[-1]) % tokens).expand(samples, *shape).contiguous()
    return torch.zeros(samples, *shape)


def _trial(module: nn.Module, classes: int, x: Tensor) -> dict:
    """Run the module in each mode on two samples, and report what it does."""
    watch = Substitutes(None, torch.tensor(0))
    with torch.no_grad(), isolated(0, "trial"), refusing(x.shape[1:]):
        with watch:
            outputs = [module.train()(x)]
        logits, flops = of_forward(module.eval(), x)
        outputs.append(logits)
    for logits in outputs:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != [2, classes]:
            raise ValueError(f"name: the model gives {found} for 2 samples, not [2, {classes}]")
    return {
        "flops": flops // 2,
        "batch_statistics": watch.met_batch_norm,
        "noisy": watch.met_noise,
    }


def _leaves(
    module: nn.Module, watched: Watched
) -> tuple[dict[str, Leaf], dict[str, Leaf], Tree, Tree]:
    """What is known of every leaf, and of those that are frozen; initial values, constants."""
    leaves, locked, initial, constants = {}, {}, {}, {}
    places, parameters = _names_of(module), {*map(id, module.parameters())}
    of_head = {_place(module, name) for name in watched.leaves}
    for name, value in tensors(module).items():
        trained = id(value) in parameters and value.requires_grad
        if not value.is_floating_point():
            if trained:
                raise ValueError(
                    f"name: parameter {name} of the network is {value.dtype}, which no method "
                    "trains; hold its real and imaginary part as two parameters (torch.complex "
                    "joins them), or freeze it by requires_grad_(False)"
                )
            constants[name] = value.detach().clone()
            continue
        if id(value) not in parameters:
            role = "stats"
        elif isinstance(module.get_submodule(owner_of(name)), _NORMS):
            role = "norm"
        else:
            role = "head" if of_head.issuperset(_place(module, n) for n in places[name]) else "body"
        weighs = places[name] if role in ("body", "head") else ()
        matrices = (matrix_of(module, n, value, watched.matrices) for n in weighs)
        leaf = Leaf(tuple(value.shape), role, next(filter(None, matrices), ""))
        frozen = role != "stats" and not trained
        (locked if frozen else leaves)[name] = leaf
        (constants if frozen else initial)[name] = value.detach().clone()
    return leaves, locked, initial, constants


def _names_of(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter and buffer, by the first."""
    ties, found = find_ties(module), {}
    for name in tensors(module, again=True):
        found.setdefault(ties.get(name, name), []).append(name)
    return found


def _place(module: nn.Module, name: str) -> tuple[int, str]:
    """Where a parameter is, whatever the layer that has it is called."""
    owner, _, own = name.rpartition(".")
    return id(module.get_submodule(owner)), own
