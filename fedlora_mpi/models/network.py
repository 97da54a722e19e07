"""A network as a pure function of a tree, with a role for every leaf.

Roles come from module TYPES and from what a forward pass does, never from names. ``norm`` are the
parameters of normalisation layers. ``stats`` are float buffers, such as running statistics.
``head`` is the classifier: the last product with a weight on the way to the logits, see
``watching.py``. ``body`` is the rest. Integer buffers are constants: they belong to no client and
are never sent. Parameters that the builder has frozen (``requires_grad`` is False) are constants as
well: no method changes them.

A parameter or buffer in several places (tied weights) is one leaf, with the name and the role of
the first place. It is ``body`` if any of its places is outside the classifier.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from ..core.batch import Batch
from ..core.escapes import summarize_error
from ..core.losses import CROSS_ENTROPY, Loss
from ..core.names import slice_name, sliced_weight
from ..core.seeds import isolate_rng
from ..core.tree import Tree
from .counting import forward_with_flops
from .effects import Effects
from .matrices import Fused, find_fused, matrix_kind, why_no_matrix
from .output_field import Field, TakeField, describe_output, find_field
from .purity import check_functional, find_effects, trial_inputs
from .substitutes import Substitutes
from .ties import call_with_leaves, find_leaf_names, find_ties, named_tensors, restore_ties
from .unwrapping import (
    copy_module,
    explain_refusal,
    has_lazy_layers,
    remove_values,
    unwrap,
)
from .watching import ForwardTrace, Matrix, name_head, owning_module, trace_forward

Role = Literal["body", "head", "norm", "stats"]
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


class Leaf(NamedTuple):
    """Shape, role and use of a leaf; its value is elsewhere."""

    shape: tuple[int, ...]
    role: Role
    matrix: Matrix  # how a low-rank part reads it; "" if it cannot have one

    @property
    def is_linear(self) -> bool:
        """Whether it is read as the matrix of a linear map, which has no kernel."""
        return self.matrix == "linear" or self.matrix == "transposed" and len(self.shape) == 2


class StartAdapter(NamedTuple):
    """A low-rank part from which methods start, beside the network's initial weights.

    factors: {weight: (A [r, in side], B [out side, r], s)}; it starts as W_0 + s B A.
    whole: the leaves whose initial values came with it.
    """

    factors: Mapping[str, tuple[Tensor, Tensor, float]] = {}
    whole: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Model:
    """A network: ``model(tree, x)`` returns logits [B, classes] for the leaves ``tree``.

    A language model returns [B, L, V]: at each position the logits of the next token.
    ``model.loss(logits, batch)`` is the mean loss of a batch, as ``model.loss`` of a config says.
    Where the targets are no classes, ``classes`` counts the outputs.
    In training mode BatchNorm writes its running statistics into the ``stats`` leaves of ``tree``.
    ``flops`` counts one forward pass of one sample (a multiply-add is 2).
    """

    leaves: dict[str, Leaf]
    initial: Tree
    constants: Tree
    # the frozen parameters among the constants; a low-rank part can be added to them
    frozen_leaves: dict[str, Leaf]
    shape: tuple[int, ...]  # shape of one input, without the batch axis
    tokens: int  # number of token ids: inputs are integers below it; 0: inputs are floats
    classes: int
    flops: int
    batch_statistics: bool  # some layer normalises by the statistics of its batch
    noisy: bool  # some layer draws random numbers in training
    training: bool
    modules: tuple[nn.Module, nn.Module]  # the network without values: (evaluation, training) mode
    bodies: tuple[nn.Module, nn.Module]  # the same with an identity in place of the head
    # name of the module that is the classifier; "" if there is none or if it is the whole network
    head: str
    ties: dict[str, str]  # {further name: first name} of tied leaves and constants
    # {name in the module: leaf} of the network, of its body and of its head
    leaf_names: tuple[dict[str, str], ...]
    effects: Effects = Effects()  # side effects of a pass, beside BatchNorm's statistics
    # the result for an example depends on the other examples of the batch, padding included
    couples: bool = False
    # the head is one plain Linear that maps features [B, width] to the logits
    ends_in_linear: bool = False
    # the field of the module's own output that holds the logits; None if it returns them alone
    output: Field | None = None
    loss: Loss = CROSS_ENTROPY
    # {weight: the matrices that it holds} of the weights that hold more than one
    fused: dict[str, Fused] = field(default_factory=dict)
    # the type in which a pass computes, where the parameters are stored in it; None: as it comes
    dtype: torch.dtype | None = None
    # names of the modules that training passes compute twice, see ``recomputing.py``
    recomputed: tuple[str, ...] = ()
    adapter: StartAdapter = StartAdapter()

    def __call__(self, tree: Tree, x: Tensor) -> Tensor:
        return self._call(self.modules[self.training], self.leaf_names[0], tree, x, self.effects)

    def features(self, tree: Tree, x: Tensor) -> Tensor:
        """Return the features that enter the head, [B, width]; no leaf of the head is needed."""
        return self._call(self.bodies[self.training], self.leaf_names[1], tree, x, self.effects)

    def classify(self, tree: Tree, z: Tensor) -> Tensor:
        """Return the head's logits [B, classes] for features [B, width].

        Only leaves of the head are needed. ``model(tree, x)`` equals ``classify(tree,
        features(tree, x))`` if the head comes last.
        """
        head = self.modules[self.training].get_submodule(self.head)
        return self._call(head, self.leaf_names[2], tree, z, self.effects.for_submodule(self.head))

    def replace_output(
        self, tree: Tree, x: Tensor, place: str, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the logits where ``change(h)`` takes the place of h, the output of a module.

        place: the module's name; "": h is what enters the head. ``change`` may return k rows for
        each of h, one after another; there are then as many rows of logits.
        """
        if not place:
            return self.replace_input(tree, x, self.head, change)
        self._check_hook(place)
        hook = (
            self.modules[self.training]
            .get_submodule(place)
            .register_forward_hook(lambda part, inputs, output: change(output))
        )
        return self._call_with_hook(tree, x, hook)

    def replace_input(
        self, tree: Tree, x: Tensor, place: str, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the logits where ``change(h)`` takes the place of h, the first input of the module
        ``place``.
        """
        self._check_hook(place)
        hook = (
            self.modules[self.training]
            .get_submodule(place)
            .register_forward_pre_hook(lambda part, inputs: (change(inputs[0]), *inputs[1:]))
        )
        return self._call_with_hook(tree, x, hook)

    def _check_hook(self, place: str) -> None:
        """Raise ValueError if a change at ``place`` would be missing where a block runs again."""
        if self.training and any(place.startswith(f"{block}.") for block in self.recomputed):
            raise ValueError(
                f"engine.gradient_checkpointing = true: the method changes what {place} gives, "
                "inside a block that is computed again; set it to false"
            )

    def _call_with_hook(self, tree: Tree, x: Tensor, hook: RemovableHandle) -> Tensor:
        try:
            return self(tree, x)
        finally:
            hook.remove()

    def _call(
        self, module: nn.Module, leaf_names: dict[str, str], tree: Tree, x: Tensor, effects: Effects
    ) -> Tensor:
        """Return the output of ``module`` with its leaves from ``tree``.

        Raises ValueError for a missing leaf, since the module itself holds no values.
        """
        values = {**self.constants, **tree}
        try:
            module_leaves = {place: values[leaf] for place, leaf in leaf_names.items()}
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]} of the network has no value: what a method's client_model "
                "returns must hold every leaf of model.leaves"
            ) from None
        if self.dtype is not None:
            module_leaves = {
                place: self._cast_parameter(leaf_names[place], v)
                for place, v in module_leaves.items()
            }
            x = x.to(self.dtype) if x.is_floating_point() else x
        if effects == Effects():
            result = call_with_leaves(module, module_leaves, (x,))
        else:
            result = effects.run_module(module, module_leaves, x, self.training)
        return result if self.dtype is None else result.float()

    def _cast_parameter(self, leaf: str, value: Tensor) -> Tensor:
        """Return the value of a leaf in the type ``dtype``, if it is a parameter."""
        is_parameter = leaf in self.frozen_leaves or self.role(leaf) not in (None, "stats")
        return value.to(self.dtype) if is_parameter and value.dtype != self.dtype else value

    def zero_inputs(self, samples: int) -> Tensor:
        """Return inputs [samples, *shape] without information, see ``_zero_inputs``."""
        with torch.device("meta") if self.is_without_values else nullcontext():
            return _zero_inputs(samples, self.shape, self.tokens)

    @property
    def is_without_values(self) -> bool:
        """Whether initial weights are on the device meta, where they have shapes alone."""
        return any(v.is_meta for v in self.all_values.values())

    def training_context(self, batch: Batch) -> AbstractContextManager:
        """Return the context for training passes on a mini-batch of one client.

        It is ``Substitutes`` if padding, a single example or random layers need it.
        """
        # padded, or too small for BatchNorm's variance
        is_irregular = batch.real is not None or len(batch.y) == 1
        needs_substitutes = self.noisy or (is_irregular and self.batch_statistics)
        return Substitutes(batch.real, batch.key) if needs_substitutes else nullcontext()

    def evaluation_context(self, batch: Batch) -> AbstractContextManager:
        """Return the context for evaluation on a mini-batch of one client.

        It is ``Substitutes`` if the network couples examples: such a network may have to normalise
        a batch of one example by its own statistics.
        """
        return Substitutes(batch.real, batch.key) if self.couples else nullcontext()

    def detach_tree(self, tree: Tree) -> Tree:
        """Return ``tree`` detached, with its statistics copied.

        Use it for a forward pass without side effects, such as a teacher's.
        """
        return {
            n: v.detach().clone() if self._is_written(n) else v.detach() for n, v in tree.items()
        }

    def copy_statistics(self, tree: Tree) -> Tree:
        """Return ``tree`` with its statistics copied, for a second forward pass that trains."""
        return {n: v.clone() if self._is_written(n) else v for n, v in tree.items()}

    def _is_written(self, leaf: str) -> bool:
        return self.role(leaf) == "stats" or leaf in self.effects.written_parameters

    def eval_mode(self) -> "Model":
        """Return the same network in evaluation mode."""
        return replace(self, training=False)

    @cached_property
    def fixed_norm_model(self) -> "Model":
        """The same network, but its BatchNorm uses running statistics in training as well."""
        training = copy.deepcopy(self.modules[True]), copy.deepcopy(self.bodies[True])
        for layer in (layer for module in training for layer in module.modules()):
            if isinstance(layer, _NormBase):
                layer.eval()
        modules, bodies = (
            (pair[False], training_module)
            for pair, training_module in zip((self.modules, self.bodies), training, strict=True)
        )
        return replace(self, batch_statistics=False, modules=modules, bodies=bodies)

    def to(self, device: torch.device) -> "Model":
        """Return the same network with its initial weights and constants on ``device``; those on
        the device meta stay there.
        """
        initial, constants = (
            {n: v if v.is_meta else v.to(device) for n, v in tree.items()}
            for tree in (self.initial, self.constants)
        )
        return replace(self, initial=initial, constants=constants)

    def role(self, leaf: str) -> Role | None:
        """Return the role of a leaf; None for a frozen one or an algorithm's own leaf."""
        return self.leaves[leaf].role if leaf in self.leaves else None

    @property
    def all_leaves(self) -> dict[str, Leaf]:
        """``leaves`` and the frozen leaves."""
        return self.leaves | self.frozen_leaves

    def leaf(self, name: str) -> Leaf:
        """Return a leaf, or a slice of one as a leaf of its own."""
        leaf = self.leaves.get(name) or self.frozen_leaves.get(name)
        return leaf or self.slices(sliced_weight(name))[name]

    def slices(self, weight: str) -> dict[str, Leaf]:
        """Return {name: leaf} of the slices of a weight; {} if it holds one matrix."""
        fused = self.fused.get(weight)
        if fused is None:
            return {}
        leaf = self.leaf(weight)
        shape = [*leaf.shape]
        shape[fused.axis] //= len(fused.matrices)
        leaf = leaf._replace(shape=tuple(shape))
        return {slice_name(weight, matrix): leaf for matrix in fused.matrices}

    @property
    def all_values(self) -> Tree:
        """``initial`` and the values of the frozen leaves."""
        return self.initial | {n: self.constants[n] for n in self.frozen_leaves}

    @property
    def nbytes(self) -> int:
        """Bytes of the initial values and the constants, which all clients of a worker share."""
        return sum(v.nbytes for tree in (self.initial, self.constants) for v in tree.values())

    @property
    def read_nbytes(self) -> int:
        """Bytes of the same numbers as they are read, before any are quantized."""
        trees = (self.initial, self.constants)
        return sum(v.numel() * v.element_size() for tree in trees for v in tree.values())

    def why_no_matrix(self, leaf: str) -> str:
        """Return why a leaf (frozen or not) is not read as a matrix; "" if it is."""
        shape, role, matrix = self.all_leaves[leaf]
        return "" if matrix else why_no_matrix(self.modules[False], leaf, shape, role)

    def to_module(self, tree: Tree) -> nn.Module:
        """Return an ordinary nn.Module in evaluation mode that holds a copy of ``tree``."""
        module = restore_ties(copy.deepcopy(self.modules[False]).to_empty(device="cpu"), self.ties)
        values = {**self.constants, **tree}
        for name, place in named_tensors(module).items():
            place.data.copy_(values[name])
        return module


def from_module(
    module: nn.Module,
    classes: int,
    shape: tuple[int, ...],
    tokens: int = 0,
    *,
    head: str | None = None,
    output: Field | None = None,
    positions: int = 0,
    dtype: torch.dtype | None = None,
    trial: bool = True,
    keep: bool = False,
) -> Model:
    """Return the model of ``module``, whose present parameters become the initial values.

    ``shape``: the shape of one input, without the batch axis. ``tokens``: as in ``Model``.
    ``head``: the name of the module that is the head; None: see ``watching``. ``output``: the field
    of the module's output that holds the logits; None: see ``output_field``. ``positions``: the
    logits are [B, positions, classes]; 0: they are [B, classes]. ``dtype``: store the parameters so
    and compute in it, from inputs and to logits in float32; None: as ``module`` has them.
    ``trial``: whether ``module`` may come wrapped and passes are tried for side effects. Without it
    ``module`` may be on the device meta, if that is torch's default device. ``keep``: nobody else
    uses ``module``, so its tensors are the initial values and a large network is in memory once.

    Raises ValueError if the module does not map [B, *shape] to logits of this shape, has a
    BatchNorm with a cumulative average instead of a momentum, has a parameter that cannot be
    trained, or is not a function of its parameters, buffers and inputs (see ``purity``).
    """
    module = unwrap(module) if trial else module
    module, zeros = _prepare_module(module, _zero_inputs(2, shape, tokens), dtype, trial)
    expected = [2, positions, classes] if positions else [2, classes]
    traits = _probe_module(copy_module(module, keep), expected, zeros, output)
    if traits["output"] is not None:
        module.register_forward_hook(TakeField(traits["output"]))
    x, other_inputs = trial_inputs(module, zeros, tokens) if trial else (zeros, zeros)
    pass_effects = find_effects(module, x, other_inputs) if trial else Effects()
    ties, trace = find_ties(module), trace_forward(module, zeros, classes, keep)
    if head is not None:
        trace = name_head(module, zeros, trace, head)
    leaves, locked, initial, constants = _classify_leaves(module, trace, keep)
    if head is not None and "head" not in {leaf.role for leaf in (leaves | locked).values()}:
        raise ValueError(
            f"head = {head}: all its parameters are those of other layers too (tied), or of "
            "normalisation layers"
        )
    empty = remove_values(module) if keep else copy.deepcopy(module).to("meta")
    skeleton = restore_ties(empty, ties)
    modules = (skeleton.eval(), copy.deepcopy(skeleton).train())
    eval_body, train_body = (_remove_head(copy.deepcopy(m), trace.head) for m in modules)
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
        bodies=(eval_body, train_body),
        head=trace.head,
        ties=ties,
        leaf_names=find_leaf_names(modules[0], eval_body, trace.head, ties),
        effects=pass_effects,
        fused=_find_fused_weights(module, leaves | locked),
    )
    if trial:
        check_functional(module, model, x)
    return replace(model, ends_in_linear=_ends_in_linear(model, x), dtype=dtype)


def _prepare_module(
    module: nn.Module, zeros: Tensor, dtype: torch.dtype | None, trial: bool
) -> tuple[nn.Module, Tensor]:
    """Return a network with all its parameters, and inputs ``zeros`` for it; see ``from_module``.

    Raises ValueError for a network that cannot be used.
    """
    if trial:
        _materialize(module, zeros)
    if dtype is not None:
        _store_parameters(module, dtype)
        zeros = zeros.to(dtype) if zeros.is_floating_point() else zeros
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            if layer.momentum is None:
                raise ValueError(f"name: layer {name} has momentum None (a cumulative average)")
            layer.num_batches_tracked = None
    return module, zeros


def _store_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the floating-point parameters of ``module`` the type ``dtype``; buffers keep theirs.

    Raises ValueError for a BatchNorm, whose statistics need float32 beside it.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase):
            raise ValueError(
                f"dtype = {str(dtype).removeprefix('torch.')}: layer {name} normalises by "
                "statistics, which need float32; engine.precision=bf16 computes the rest in "
                "bfloat16"
            )
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _ends_in_linear(model: Model, x: Tensor) -> bool:
    """Return the value of ``Model.ends_in_linear``, found by a trial on inputs x."""
    head, prefix = (
        model.modules[False].get_submodule(model.head),
        f"{model.head}." if model.head else "",
    )
    head_leaves = {n for n, leaf in model.all_leaves.items() if leaf.role == "head"}
    if not isinstance(head, nn.Linear) or not {f"{prefix}weight"} <= head_leaves <= {
        f"{prefix}weight",
        f"{prefix}bias",
    }:
        return False
    eval_model, tree = model.eval_mode(), model.detach_tree(model.initial)
    with torch.no_grad(), isolate_rng(0, "trial"), Substitutes(None, torch.tensor(0)):
        try:
            z = eval_model.features(tree, x.clone())
            logits, expected = eval_model.classify(tree, z), eval_model(tree, x.clone())
            return z.dim() == 2 and (
                logits.is_meta or torch.allclose(logits, expected, 1e-4, 1e-5, True)
            )
        except (RuntimeError, AttributeError, ValueError):
            # the network uses its head in other ways than calling it
            return False


def _materialize(module: nn.Module, zeros: Tensor) -> None:
    """Run a forward pass if the network creates parameters in its first one.

    LazyLinear does, and so does a user's ``if not hasattr(self, ...)``. Raises ValueError if the
    network or a copy of it refuses such inputs.
    """
    with torch.no_grad():
        if not has_lazy_layers(module):
            twin = copy_module(module)
            try:
                with isolate_rng(0, "trial"):
                    twin.eval()(zeros)
            except Exception as error:
                with explain_refusal(zeros.shape[1:]):
                    module.eval()(zeros)
                raise ValueError(
                    "name: a copy of the model fails where the model does not: "
                    f"{summarize_error(error)}; a hook or function made in __init__ holds the "
                    "model or what is its own; make it a method"
                ) from error
            if len(list(twin.parameters())) == len(list(module.parameters())):
                return
        with explain_refusal(zeros.shape[1:]):
            module.eval()(zeros)


def _remove_head(module: nn.Module, head: str) -> nn.Module:
    """Replace the head of ``module`` by an identity and return the module."""
    if not head:  # the module is its own head
        return nn.Identity()
    head_module, identity = module.get_submodule(head), nn.Identity()
    for name in [n for n, m in module.named_modules(remove_duplicate=False) if m is head_module]:
        module.set_submodule(name, identity)
    return module


def _zero_inputs(samples: int, shape: tuple[int, ...], tokens: int) -> Tensor:
    # Texts count 1, 2, ...: a text of padding alone has length 0, which packed sequences refuse.
    if tokens:
        return (torch.arange(1, 1 + shape[-1]) % tokens).expand(samples, *shape).contiguous()
    return torch.zeros(samples, *shape)


def _probe_module(module: nn.Module, expected: list[int], x: Tensor, output: Field | None) -> dict:
    """Run the module in each mode on two samples; return fields of ``Model`` that this shows.

    output: as in ``from_module``. Raises ValueError unless the logits have the shape ``expected``.
    """
    substitutes = Substitutes(None, torch.tensor(0))
    with torch.no_grad(), isolate_rng(0, "trial"), explain_refusal(x.shape[1:]):
        with substitutes:
            outputs = [module.train()(x)]
        evaluated, flops = forward_with_flops(module.eval(), x)
        outputs.append(evaluated)
    field = find_field(outputs, expected, output)
    for value in outputs:
        logits = value if field is None else TakeField(field)(module, (), value)
        if not isinstance(logits, Tensor) or list(logits.shape) != expected:
            source = "name: the model" if output is None else f"output = {output}: the field"
            raise ValueError(
                f"{source} gives {describe_output(logits)} for 2 samples, not {expected}"
            )
    return {
        "flops": flops // 2,
        "batch_statistics": substitutes.met_batch_norm,
        "noisy": substitutes.met_noise,
        "output": field,
    }


def _classify_leaves(
    module: nn.Module, trace: ForwardTrace, keep: bool
) -> tuple[dict[str, Leaf], dict[str, Leaf], Tree, Tree]:
    """Return the leaves, the frozen leaves, the initial values and the constants; with ``keep``,
    values are the module's own tensors.

    Raises ValueError for a trained parameter that is not floating-point.
    """
    leaves: dict[str, Leaf] = {}
    locked: dict[str, Leaf] = {}
    initial: Tree = {}
    constants: Tree = {}
    names_by_leaf, parameters = _names_by_leaf(module), {*map(id, module.parameters())}
    head_locations = {_location(module, name) for name in trace.leaves}
    for name, value in named_tensors(module).items():
        trained = id(value) in parameters and value.requires_grad
        if not value.is_floating_point():
            if trained:
                raise ValueError(
                    f"name: parameter {name} of the network is {value.dtype}, which no method "
                    "trains; hold its real and imaginary part as two parameters (torch.complex "
                    "joins them), or freeze it by requires_grad_(False)"
                )
            constants[name] = value.detach() if keep else value.detach().clone()
            continue
        role: Role
        if id(value) not in parameters:
            role = "stats"
        elif isinstance(module.get_submodule(owning_module(name)), _NORMS):
            role = "norm"
        else:
            role = (
                "head"
                if head_locations.issuperset(_location(module, n) for n in names_by_leaf[name])
                else "body"
            )
        weight_names = names_by_leaf[name] if role in ("body", "head") else ()
        matrices = (matrix_kind(module, n, value, trace.matrices) for n in weight_names)
        leaf = Leaf(tuple(value.shape), role, next(filter(None, matrices), ""))
        frozen = role != "stats" and not trained
        (locked if frozen else leaves)[name] = leaf
        values = constants if frozen else initial
        values[name] = value.detach() if keep else value.detach().clone()
    return leaves, locked, initial, constants


def _find_fused_weights(module: nn.Module, leaves: dict[str, Leaf]) -> dict[str, Fused]:
    """Return the value of ``Model.fused``."""
    fused = {n: find_fused(module, n, leaf.shape) for n, leaf in leaves.items() if leaf.matrix}
    return {n: matrices for n, matrices in fused.items() if matrices is not None}


def _names_by_leaf(module: nn.Module) -> dict[str, list[str]]:
    """Return {first name: all names} of the parameters and buffers."""
    ties = find_ties(module)
    names: dict[str, list[str]] = {}
    for name in named_tensors(module, all_names=True):
        names.setdefault(ties.get(name, name), []).append(name)
    return names


def _location(module: nn.Module, name: str) -> tuple[int, str]:
    """Return the place of a parameter: the id of its layer, and its name in that layer."""
    owner, _, local_name = name.rpartition(".")
    return id(module.get_submodule(owner)), local_name
