"""Test whether a network is a function of its leaves, its input and the key of its noise.

The test runs when a network is built. A run evaluates one module with the leaves of each client, in
any order, on any rank, and again after a resume. So a pass may write to float buffers and to
parameters, but nothing else that it changes may influence another pass.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.escapes import summarize_error
from ..core.seeds import global_states, isolate_rng, rng
from ..core.tree import Tree
from .effects import Effects, OutArgumentMode
from .state import Memory, none_buffers, read_memory, restore_attributes
from .substitutes import Substitutes
from .unwrapping import copy_module, explain_refusal

_OTHER_STATE = "which other ranks and a resume have in another state"
_SEEDED_NOISE_HINT = (
    "in training nn.Dropout, functional.dropout with training=self.training, torch.rand, randn, "
    "rand_like, randn_like and Tensor.bernoulli_ draw from the run's seed"
)
_RELATIVE_TOLERANCE = 1e-3  # relative to the largest number; rounding adds up over many layers
_FLOAT_BUFFER_HINT = (
    "make it a float buffer that training passes write to in place, such as self.{0}.add_(1), or "
    "leave it out"
)


class _PassRecord(NamedTuple):
    """The observations of one forward pass."""

    training: bool
    logits: Tensor
    memory_before: Memory
    memory_after: Memory
    written_leaves: frozenset[str]  # leaves whose numbers changed
    assigned_leaves: frozenset[str]  # leaves that were replaced by another tensor
    wrote_input: bool
    used_out: bool


class _LeafSnapshot:
    """A copy of the parameters and float buffers of a module, to restore them."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.none_buffers = module, none_buffers(module)
        self._initial_names = self._leaf_names()
        self._registrations: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
            (registry, name, value, value.detach().clone())
            for layer in module.modules()
            for registry in (layer._parameters, layer._buffers)
            for name, value in registry.items()
            if value is not None and (registry is layer._parameters or value.is_floating_point())
        ]
        named_leaves = (*module.named_parameters(), *module.named_buffers())
        self._name_by_id = {id(value): name for name, value in named_leaves}

    def restore(self) -> tuple[frozenset[str], frozenset[str]]:
        """Undo the changes of a pass to the leaves.

        Returns the names of leaves whose numbers changed, and of leaves that were replaced by
        another tensor. Raises ValueError if leaves were added or removed.
        """
        if changed := (self._initial_names ^ self._leaf_names()) - self.none_buffers:
            raise ValueError(
                f"name: a forward pass adds or removes {min(changed)}; make all parameters and "
                "buffers in __init__"
            )
        written, assigned = set(), set()
        for registry, name, value, initial in self._registrations:
            leaf_name, current = self._name_by_id[id(value)], registry[name]
            if current is not value:
                self._check_assigned(leaf_name, isinstance(value, nn.Parameter), initial, current)
                assigned.add(leaf_name)
            if not _is_equal(current, initial) or not _is_equal(value, initial):
                written.add(leaf_name)
                value.data.copy_(initial)
            registry[name] = value
        return frozenset(written), frozenset(assigned)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the present parameters and buffers, each under all its names."""
        parts = self._module.named_parameters, self._module.named_buffers
        return [(name, v.detach()) for part in parts for name, v in part(remove_duplicate=False)]

    def perturb(self) -> None:
        """Change the numbers of every leaf."""
        for number, value in enumerate(
            {id(value): value for _, _, value, _ in self._registrations}.values()
        ):
            value.data.copy_(_perturb(value.detach(), isinstance(value, nn.Parameter), number))

    def _leaf_names(self) -> set[str]:
        return {name for name, _ in self.named_tensors()}

    @staticmethod
    def _check_assigned(name: str, parameter: bool, initial: Tensor, current: Tensor) -> None:
        """Raise ValueError if the tensor that a pass assigned cannot replace the leaf."""
        attribute = name.rpartition(".")[2]
        if parameter:
            raise ValueError(
                f"name: a forward pass replaces parameter {name}; write to it in place under "
                f"torch.no_grad(), such as self.{attribute}.copy_(...)"
            )
        if (current.shape, current.dtype) != (initial.shape, initial.dtype):
            old_type, new_type = (
                f"{list(v.shape)} {str(v.dtype).removeprefix('torch.')}" for v in (initial, current)
            )
            raise ValueError(
                f"name: a forward pass turns buffer {name} from {old_type} into {new_type}; give "
                "it its shape and type in __init__, or hold what is only cached in a plain "
                "attribute"
            )


def find_effects(module: nn.Module, x: Tensor, other_inputs: Tensor) -> Effects:
    """Return the side effects of passes of ``module`` on two trial inputs [2, ...].

    ``module`` is not changed. Raises ValueError if a pass draws from a global generator or if
    earlier passes can change its result.
    """
    with torch.no_grad(), isolate_rng(0, "trial"):
        train, evaluate = _make_passes(copy_module(module))
        passes = [
            evaluate(x),
            *map(train, (x, other_inputs, other_inputs, x)),
            *map(evaluate, (other_inputs, other_inputs, x)),
        ]
        # In a new copy: the first pass above may have stored values made from ``x``.
        fresh_pass = _make_passes(copy_module(module))[0](other_inputs)
    for first_index, second_index in ((1, 4), (2, 3), (0, 7), (5, 6)):
        _check_same_pass(passes[first_index], passes[second_index])
    if not _is_equal(fresh_pass.logits, passes[2].logits):
        _check_same_pass(fresh_pass, passes[2])
    first_pass = passes[0]
    evaluation_leaves = frozenset().union(
        *(each.written_leaves | each.assigned_leaves for each in passes if not each.training)
    )
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return Effects(
        reassigned_leaves=frozenset().union(*(each.assigned_leaves for each in passes)),
        written_parameters=frozenset().union(*(each.written_leaves for each in passes))
        & parameters,
        written_in_evaluation=evaluation_leaves,
        stateful_modules=_owning_modules(
            module,
            {
                name
                for each in passes
                for name in _changed_names(first_pass.memory_before, each.memory_after)
            },
        ),
        writes_input=any(each.wrote_input for each in passes),
        uses_out=any(each.used_out for each in passes),
    )


def check_functional(module: nn.Module, model, x: Tensor) -> None:
    """Raise ValueError unless ``model`` and ``module`` give the same results with changed leaves.

    Changed leaves reveal a weight that a pass takes from elsewhere. ``module`` is restored
    afterwards.
    """
    leaves = _LeafSnapshot(module)
    with (
        torch.no_grad(),
        isolate_rng(0, "trial"),
        restore_attributes(module, model.effects.stateful_modules),
    ):
        for training in (False, True):
            leaves.perturb()
            tree = {
                n: v.clone()
                for n, v in leaves.named_tensors()
                if n in model.initial or n in model.constants
            }
            leaves.restore()  # so that weights held elsewhere differ from those in ``tree``
            try:
                ours = (
                    _training_logits(model, tree, x.clone())
                    if training
                    else model.eval_mode()(tree, x.clone())
                )
            except Exception as error:
                raise ValueError(
                    "name: the model cannot run with weights that torch.func.functional_call "
                    f"gives it: {summarize_error(error)}; gradient checkpointing, for one, cannot"
                ) from error
            leaves.perturb()
            with _noise_context(training):
                theirs = module.train(training)(x.clone())
            statistics = {
                n: v for n, v in leaves.named_tensors() if training and model.role(n) == "stats"
            }
            is_same = _is_close(ours, theirs) and all(
                _is_close(tree[name], v) for name, v in statistics.items()
            )
            leaves.restore()
            if not is_same:
                raise ValueError(f"name: {_explain_foreign_weights(module)}")


def _training_logits(model, tree: Tree, x: Tensor) -> Tensor:
    """Return the logits of a training pass, after a backward pass, which must also work."""
    trained_leaves = {
        name: v.requires_grad_()
        for name, v in tree.items()
        if model.role(name) not in ("stats", None)
    }
    with torch.enable_grad(), _noise_context(True):
        logits = model(tree, x)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), tuple(trained_leaves.values()), allow_unused=True)
    return logits.detach()


def _make_passes(
    module: nn.Module,
) -> tuple[Callable[[Tensor], _PassRecord], Callable[[Tensor], _PassRecord]]:
    """Return functions that record a forward pass of ``module`` in training and in evaluation.

    Both start from the same leaves. These differ from the initial ones, because a head of zeros
    would hide everything before it.
    """
    _LeafSnapshot(module).perturb()
    leaves = _LeafSnapshot(module)
    return partial(_record_pass, module, leaves, True), partial(_record_pass, module, leaves, False)


def trial_inputs(module: nn.Module, zeros: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return two different random inputs shaped like ``zeros``, or ``zeros`` twice.

    The latter are returned if the network refuses random inputs. tokens: as in ``Model``.
    """
    generator = rng(0, "trial")
    sample = partial(torch.randint, tokens) if tokens else torch.randn
    x, other_inputs = (sample(zeros.shape, generator=generator) for _ in range(2))
    try:
        with torch.no_grad(), isolate_rng(0, "trial"), _noise_context(True):
            copy_module(module).train()(x.clone())
    except Exception:
        return zeros, zeros
    return x, other_inputs


def _noise_context(training: bool) -> AbstractContextManager:
    """Return the context of a trial pass; as in a run, evaluation has no noise."""
    return Substitutes(None, torch.tensor(0)) if training else nullcontext()


def _record_pass(
    module: nn.Module, leaves: _LeafSnapshot, training: bool, x: Tensor
) -> _PassRecord:
    """Record a forward pass and undo its changes to the leaves.

    Raises ValueError if it draws from a global generator.
    """
    input_copy, memory_before, states = (
        x.clone(),
        read_memory(module, leaves.none_buffers),
        global_states(),
    )
    with explain_refusal(x.shape[1:]), _noise_context(training), OutArgumentMode() as copying:
        logits = module.train(training)(input_copy).clone()
    for owner, state in global_states().items():
        if state != states[owner]:
            mode = "training" if training else "evaluation"
            raise ValueError(
                f"name: a forward pass in {mode} draws random numbers from {owner} global "
                f"generator, {_OTHER_STATE}; {_SEEDED_NOISE_HINT}"
            )
    memory_after = read_memory(module, leaves.none_buffers)
    return _PassRecord(
        training,
        logits,
        memory_before,
        memory_after,
        *leaves.restore(),
        not _is_equal(input_copy, x),
        copying.met_out,
    )


def _check_same_pass(first: _PassRecord, second: _PassRecord) -> None:
    """Raise ValueError unless two passes on the same leaves and input behaved alike."""
    mode = "training" if first.training else "evaluation"
    changed = _changed_names(first.memory_after, second.memory_after)
    changed_within = {
        name
        for each in (first, second)
        for name in _changed_names(each.memory_before, each.memory_after)
    }
    for name in (
        name
        for name in changed
        if name in changed_within and name in first.memory_after and name in second.memory_after
    ):
        kinds = {
            memory[name].kind
            for memory in (first.memory_after, second.memory_after)
            if name in memory
        }
        attribute = name.rpartition(" ")[2].rpartition(".")[2]
        if "generator" in kinds:
            raise ValueError(
                f"name: a forward pass in {mode} draws random numbers from {name}, a generator of "
                f"its own, {_OTHER_STATE}; {_SEEDED_NOISE_HINT}"
            )
        if kinds & {"number", "array"}:
            raise ValueError(
                f"name: a forward pass in {mode} changes {name} each time, which counts "
                "differently on other ranks and after a resume; "
                f"{_FLOAT_BUFFER_HINT.format(attribute)}"
            )
    if not _is_equal(first.logits, second.logits):
        causes = [*changed, *_changed_names(first.memory_before, second.memory_before)]
        if causes:
            attribute = causes[0].rpartition(" ")[2].rpartition(".")[2]
            raise ValueError(
                f"name: a forward pass in {mode} depends on {causes[0]}, which earlier passes "
                f"change; register_buffer {attribute!r} as floats and write to it in place in "
                f"training (self.{attribute}.copy_(...)), or leave it out"
            )
        raise ValueError(
            f"name: two forward passes in {mode} with the same weights on the same input give "
            "different results, as of a clock or of random numbers of its own; "
            f"{_SEEDED_NOISE_HINT}"
        )


def _changed_names(first: Memory, second: Memory) -> list[str]:
    """Return the names of the values that differ."""
    return [name for name in (first | second) if first.get(name) != second.get(name)]


def _owning_modules(module: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Return the submodules to which these attributes and buffers belong."""
    modules, owners = dict(module.named_modules()), set()
    for name in names:
        kind, _, path = name.partition(" ")
        while kind in ("attribute", "buffer") and path:
            path = path.rpartition(".")[0]
            if path in modules:
                owners.add(path)
                break
    return frozenset(owners)


def _perturb(value: Tensor, parameter: bool, number: int) -> Tensor:
    """Return numbers near ``value``; those of a buffer are a little nearer to zero."""
    ramp = (
        torch.linspace(0, 1, value.numel(), dtype=value.dtype).roll(7919 * number).view(value.shape)
    )
    return value * (1 + 0.1 * ramp) + 0.01 * ramp if parameter else value * (1 - 0.1 * ramp)


def _explain_foreign_weights(module: nn.Module) -> str:
    """Return an explanation why a pass uses other weights than those it is given."""
    name_by_id = {id(v): name for name, v in module.named_parameters()}
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            values = value.values() if isinstance(value, dict) else value
            if name.startswith("_") and name in ("_parameters", "_buffers", "_modules"):
                continue
            for tensor in (
                values if isinstance(values, list | tuple | type({}.values())) else [values]
            ):
                if id(tensor) in name_by_id:
                    attribute = f"{path}.{name}".lstrip(".")
                    return (
                        f"attribute {attribute} holds parameter {name_by_id[id(tensor)]} a second "
                        "time, which then does not follow the clients' weights; use "
                        "nn.ParameterList, nn.ParameterDict, or the parameter's own name"
                    )
    return (
        "a forward pass takes weights from elsewhere than the module's parameters and buffers (a "
        "function made in __init__ that holds a layer, a copy of a parameter?), so that it does "
        "not follow the clients' weights; read them as self.NAME in forward"
    )


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding."""
    largest = b.nan_to_num(0, 0, 0).abs().max() if b.numel() else 0
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=0, atol=_RELATIVE_TOLERANCE * float(largest), equal_nan=True
    )
