"""A network as a pure function of a tree, with the role of every leaf.

Roles come from module TYPES, never from names: ``norm`` and ``stats`` are the parameters and the
running statistics of normalisation layers, ``head`` is the classifier (the last Linear, else the
last Conv2d, in registration order), ``body`` is the rest. Integer buffers are constants: they
belong to no client and never travel.
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
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..batch import Batch
from ..seeds import isolated
from ..tree import Tree, under
from .counting import of_forward
from .effects import Effects
from .purity import check_function, effects, inputs
from .substitutes import Substitutes
from .unwrapping import brief, duplicate, refusing, unmade, unwrap

Role = Literal["body", "head", "norm", "stats"]
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)

_RESHAPING = (WeightNorm, SpectralNorm)  # they compute a layer's weight from parameters that are none


class Leaf(NamedTuple):
    """What is known of a leaf beside its value."""

    shape: tuple[int, ...]
    role: Role
    matrix: Literal["conv", "linear", ""]  # how a low-rank part reads it; "" when it has none


@dataclass(frozen=True)
class Model:
    """``model(tree, x)``: logits [B, classes] of the network whose leaves are ``tree``.

    In training mode BatchNorm writes its running statistics into the ``stats`` leaves it is given.
    ``flops`` counts one forward pass of one sample (a multiply-add is 2).
    """

    leaves: dict[str, Leaf]
    initial: Tree
    constants: Tree
    shape: tuple[int, ...]  # of one input, without the batch axis
    tokens: int  # inputs are integers below it; 0: they are floats
    classes: int
    flops: int
    batch_statistics: bool  # some layer normalises by the statistics of its batch
    noisy: bool  # some layer draws random numbers in training
    training: bool
    modules: tuple[nn.Module, nn.Module]  # the skeleton in evaluation and in training mode
    bodies: tuple[nn.Module, nn.Module]  # the same with an identity for a head
    head: str  # name of the classifier among the modules
    effects: Effects = Effects()  # of a pass, beside its logits and BatchNorm's statistics
    couples: bool = False  # what it makes of an example depends on the others of the batch, padding among them

    def __call__(self, tree: Tree, x: Tensor) -> Tensor:
        return self._run(self.modules[self.training], {**self.constants, **tree}, x, self.effects)

    def features(self, tree: Tree, x: Tensor) -> Tensor:
        """What enters the head, [B, width]; needs no leaf of the head."""
        body = {n: v for n, v in {**self.constants, **tree}.items() if not n.startswith(self._in_head)}
        return self._run(self.bodies[self.training], body, x, self.effects)

    def classify(self, tree: Tree, z: Tensor) -> Tensor:
        """The head on features [B, width]: logits [B, classes]; needs only leaves of the head.

        ``model(tree, x)`` equals ``classify(tree, features(tree, x))`` where the head comes last.
        """
        head = under(tree, self._in_head)
        module = self.modules[self.training].get_submodule(self.head)
        return self._run(module, head, z, self.effects.within(self.head))

    def _run(self, module: nn.Module, values: Tree, x: Tensor, effects: Effects) -> Tensor:
        if effects == Effects():
            return functional_call(module, values, (x,))
        return effects.call(module, values, x, self.training)

    @property
    def _in_head(self) -> str:
        """What the names of the head's leaves begin with; of a network that is its own head, all names."""
        return f"{self.head}." if self.head else ""

    def zeros(self, samples: int) -> Tensor:
        """Inputs that say nothing, [samples, *shape]."""
        return _zeros(samples, self.shape, self.tokens)

    def prepared(self, batch: Batch) -> AbstractContextManager:
        """What training passes on a mini-batch of one client run under: Substitutes, where padding, a
        single example or random layers need them."""
        odd = batch.real is not None or len(batch.y) == 1  # padded, or too small for BatchNorm
        needed = self.noisy or (odd and self.batch_statistics)
        return Substitutes(batch.real, batch.key) if needed else nullcontext()

    def judged(self, batch: Batch) -> AbstractContextManager:
        """What the evaluation of a mini-batch of one client runs under: Substitutes, where a batch of one example has
        to be normalised by itself."""
        return Substitutes(batch.real, batch.key) if self.couples else nullcontext()

    def frozen(self, tree: Tree) -> Tree:
        """``tree`` detached, its statistics copied: for a forward pass that must leave no trace, such
        as a teacher's."""
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
        """The same network, whose BatchNorm takes its running statistics as they are, in training too."""
        training = copy.deepcopy(self.modules[True]), copy.deepcopy(self.bodies[True])
        for layer in (layer for module in training for layer in module.modules()):
            if isinstance(layer, _NormBase):
                layer.eval()
        modules, bodies = ((half[False], fixed) for half, fixed in zip((self.modules, self.bodies), training))
        return replace(self, batch_statistics=False, modules=modules, bodies=bodies)

    def to(self, device: torch.device) -> "Model":
        """The same network with its initial weights and constants on ``device``."""
        initial, constants = ({n: v.to(device) for n, v in tree.items()} for tree in (self.initial, self.constants))
        return replace(self, initial=initial, constants=constants)

    def role(self, leaf: str) -> Role | None:
        """Role of a leaf; None for names that are not the network's (an algorithm's own)."""
        return self.leaves[leaf].role if leaf in self.leaves else None

    def module(self, tree: Tree) -> nn.Module:
        """An ordinary nn.Module in evaluation mode that holds a copy of ``tree``."""
        module = copy.deepcopy(self.modules[False]).to_empty(device="cpu")
        values = {**self.constants, **tree}
        for name, place in (*module.named_parameters(), *module.named_buffers()):
            place.data.copy_(values[name])
        return module


def from_module(module: nn.Module, classes: int, shape: tuple[int, ...], tokens: int = 0) -> Model:
    """The model of ``module``, whose present parameters become the initial values.

    ``shape``: of one input, without the batch axis; ``tokens``: as in ``Model``. Raises ValueError when the
    module does not map [B, *shape] to [B, classes], counts batches instead of using a momentum, or is not a
    function of its parameters, buffers and inputs (see ``purity``).
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
    found = effects(module, x, other)
    leaves, initial, constants = _leaves(module)
    skeleton = copy.deepcopy(module).to("meta")
    head = next((n for n, m in module.named_modules() if m is _head(module)), "")
    modules = (skeleton.eval(), copy.deepcopy(skeleton).train())
    bodies = tuple(_beheaded(copy.deepcopy(m), head) for m in modules)
    model = Model(
        leaves,
        initial,
        constants,
        tuple(shape),
        tokens,
        classes,
        **traits,
        training=True,
        modules=modules,
        bodies=bodies,
        head=head,
        effects=found,
    )
    check_function(module, model, x)
    return model


def _make(module: nn.Module, zeros: Tensor) -> None:
    """Let a network that makes layers in its first pass (LazyLinear, or its own ``hasattr``) make them.

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
                raise ValueError(f"name: a copy of the model fails where the model does not: {brief(error)}; a "
                                 "hook or function made in __init__ holds the model or what is its own; make it "
                                 "a method") from error
            if len(list(twin.parameters())) == len(list(module.parameters())):
                return
        with refusing(zeros.shape[1:]):
            module.eval()(zeros)


def _beheaded(module: nn.Module, head: str) -> nn.Module:
    """``module`` with an identity in the place of its head."""
    if not head:  # the module is its own head
        return nn.Identity()
    module.set_submodule(head, nn.Identity())
    return module


def _zeros(samples: int, shape: tuple[int, ...], tokens: int) -> Tensor:
    if tokens:  # words one after the other: a text of padding alone has no length, which packed sequences refuse
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


def _leaves(module: nn.Module) -> tuple[dict[str, Leaf], Tree, Tree]:
    """Every leaf, its initial value, and the constants."""
    leaves, initial, constants = {}, {}, {}
    head = _head(module)
    parameters = dict(module.named_parameters())
    for name, value in (*parameters.items(), *module.named_buffers()):
        if not value.is_floating_point():
            constants[name] = value.detach().clone()
            continue
        layer, parametrized, _ = name.partition(".parametrizations.")  # of torch.nn.utils.parametrize
        owner = module.get_submodule(layer if parametrized else name.rpartition(".")[0])
        reshaped = any(isinstance(hook, _RESHAPING) for hook in owner._forward_pre_hooks.values())
        weighs = not parametrized and not reshaped
        if name not in parameters:
            role = "stats"
        else:
            role = "norm" if isinstance(owner, _NORMS) else "head" if owner is head else "body"
        matrix = _matrix(owner, value) if role in ("body", "head") and weighs else ""
        leaves[name] = Leaf(tuple(value.shape), role, matrix)
        initial[name] = value.detach().clone()
    return leaves, initial, constants


def _head(module: nn.Module) -> nn.Module | None:
    """The classifier: the last Linear, else the last Conv2d."""
    for kind in (nn.Linear, nn.Conv2d):
        found = [m for m in module.modules() if isinstance(m, kind)]
        if found:
            return found[-1]
    return None


def _matrix(owner: nn.Module, value: Tensor) -> Literal["conv", "linear", ""]:
    """How a low-rank part reads this weight: Conv2d [O, I, K, K], Linear and attention [O, I]."""
    if isinstance(owner, nn.Conv2d) and value.dim() == 4:
        return "conv"
    if isinstance(owner, nn.Linear | nn.MultiheadAttention) and value.dim() == 2:
        return "linear"
    return ""
