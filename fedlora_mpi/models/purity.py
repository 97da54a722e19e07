"""Whether a network is a function of its leaves, its input and the key of its noise; tried at the
build.

A run gives each client's leaves to one skeleton, in any order, on any rank, and again after a
resume. So a pass may write to float buffers and to parameters, and nothing else that it leaves
behind may reach another pass.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.escapes import brief
from ..core.seeds import global_states, isolated, rng
from ..core.tree import Tree
from .effects import Copying, Effects
from .state import Memory, forgetting, remembered, unset
from .substitutes import Substitutes
from .unwrapping import duplicate, refusing

_ELSEWHERE = "which other ranks and a resume have in another state"
_KEYED = (
    "in training nn.Dropout, functional.dropout with training=self.training, torch.rand, randn, "
    "rand_like, randn_like and Tensor.bernoulli_ draw from the run's seed"
)
_ROUNDING = 1e-3  # of the largest number, through many layers
_FLOAT_BUFFER = (
    "make it a float buffer that training passes write to in place, such as self.{0}.add_(1), or "
    "leave it out"
)


class _Pass(NamedTuple):
    """What was seen of a forward pass."""

    training: bool
    logits: Tensor
    before: Memory
    after: Memory
    written: frozenset[str]  # leaves with other numbers afterwards
    assigned: frozenset[str]  # leaves that are other tensors afterwards
    input: bool
    out: bool


class _Leaves:
    """The parameters and float buffers of a module, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.unset = module, unset(module)
        self._names = self._present()
        self._places = [
            (own, name, value, value.detach().clone())
            for layer in module.modules()
            for own in (layer._parameters, layer._buffers)
            for name, value in own.items()
            if value is not None and (own is layer._parameters or value.is_floating_point())
        ]
        named = (*module.named_parameters(), *module.named_buffers())
        self._called = {id(value): name for name, value in named}

    def put_back(self) -> tuple[frozenset[str], frozenset[str]]:
        """Undo what a pass did. The names of leaves with other numbers, and of those that are other
        tensors.
        """
        if changed := (self._names ^ self._present()) - self.unset:
            raise ValueError(
                f"name: a forward pass adds or removes {min(changed)}; make all parameters and "
                "buffers in __init__"
            )
        written, assigned = set(), set()
        for own, name, value, initial in self._places:
            called, now = self._called[id(value)], own[name]
            if now is not value:
                self._check(called, isinstance(value, nn.Parameter), initial, now)
                assigned.add(called)
            if not _same(now, initial) or not _same(value, initial):
                written.add(called)
                value.data.copy_(initial)
            own[name] = value
        return frozenset(written), frozenset(assigned)

    def named(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers as they are now, each under all its names."""
        parts = self._module.named_parameters, self._module.named_buffers
        return [(name, v.detach()) for part in parts for name, v in part(remove_duplicate=False)]

    def move(self) -> None:
        """Give every leaf other numbers."""
        for number, value in enumerate(
            {id(value): value for _, _, value, _ in self._places}.values()
        ):
            value.data.copy_(_moved(value.detach(), isinstance(value, nn.Parameter), number))

    def _present(self) -> set[str]:
        return {name for name, _ in self.named()}

    @staticmethod
    def _check(name: str, parameter: bool, initial: Tensor, now: Tensor) -> None:
        """Raise ValueError where what a pass assigned cannot take the leaf's place."""
        at = name.rpartition(".")[2]
        if parameter:
            raise ValueError(
                f"name: a forward pass replaces parameter {name}; write to it in place under "
                f"torch.no_grad(), such as self.{at}.copy_(...)"
            )
        if (now.shape, now.dtype) != (initial.shape, initial.dtype):
            was, is_ = (
                f"{list(v.shape)} {str(v.dtype).removeprefix('torch.')}" for v in (initial, now)
            )
            raise ValueError(
                f"name: a forward pass turns buffer {name} from {was} into {is_}; give it its "
                "shape and type in __init__, or hold what is only cached in a plain attribute"
            )


def effects(module: nn.Module, x: Tensor, other: Tensor) -> Effects:
    """What passes of ``module``, which is not changed, leave behind; two inputs [2, ...] to try.

    Raises ValueError where a pass draws from a global generator, or earlier passes may change its
    result.
    """
    with torch.no_grad(), isolated(0, "trial"):
        train, evaluate = _passes(duplicate(module))
        passes = [evaluate(x), *map(train, (x, other, other, x)), *map(evaluate, (other, other, x))]
        fresh = _passes(duplicate(module))[0](other)  # what the first pass has set was of ``x``
    for one, again in ((1, 4), (2, 3), (0, 7), (5, 6)):
        _compare(passes[one], passes[again])
    if not _same(fresh.logits, passes[2].logits):
        _compare(fresh, passes[2])
    first = passes[0]
    in_evaluation = frozenset().union(
        *(each.written | each.assigned for each in passes if not each.training)
    )
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return Effects(
        assigned=frozenset().union(*(each.assigned for each in passes)),
        parameters=frozenset().union(*(each.written for each in passes)) & parameters,
        evaluation=in_evaluation,
        modules=_owners(
            module, {name for each in passes for name in _changed(first.before, each.after)}
        ),
        input=any(each.input for each in passes),
        out=any(each.out for each in passes),
    )


def check_function(module: nn.Module, model, x: Tensor) -> None:
    """Raise ValueError where ``model`` does not what ``module`` does, with other leaves than the
    initial ones.

    By other leaves shows a weight that a pass takes from elsewhere. ``module`` is as before
    afterwards.
    """
    leaves = _Leaves(module)
    with torch.no_grad(), isolated(0, "trial"), forgetting(module, model.effects.modules):
        for training in (False, True):
            leaves.move()
            tree = {
                n: v.clone()
                for n, v in leaves.named()
                if n in model.initial or n in model.constants
            }
            leaves.put_back()  # so that a weight from there is another than in ``tree``
            try:
                ours = (
                    _trained(model, tree, x.clone())
                    if training
                    else model.evaluating()(tree, x.clone())
                )
            except Exception as error:
                raise ValueError(
                    "name: the model cannot run with weights that torch.func.functional_call "
                    f"gives it: {brief(error)}; gradient checkpointing, for one, cannot"
                ) from error
            leaves.move()
            with _noise(training):
                theirs = module.train(training)(x.clone())
            after = {n: v for n, v in leaves.named() if training and model.role(n) == "stats"}
            same = _near(ours, theirs) and all(_near(tree[name], v) for name, v in after.items())
            leaves.put_back()
            if not same:
                raise ValueError(f"name: {_elsewhere(module)}")


def _trained(model, tree: Tree, x: Tensor) -> Tensor:
    """Logits of a pass in training, after a backward pass."""
    given = {
        name: v.requires_grad_()
        for name, v in tree.items()
        if model.role(name) not in ("stats", None)
    }
    with torch.enable_grad(), _noise(True):
        logits = model(tree, x)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), given.values(), allow_unused=True)
    return logits.detach()


def _passes(module: nn.Module) -> tuple[Callable[[Tensor], _Pass], Callable[[Tensor], _Pass]]:
    """Forward passes of ``module`` in training and in evaluation, from the same leaves: other than
    the initial ones, for a head of zeros would hide all before it.
    """
    _Leaves(module).move()
    leaves = _Leaves(module)
    return partial(_watched, module, leaves, True), partial(_watched, module, leaves, False)


def inputs(module: nn.Module, zeros: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Two inputs of different numbers, like ``zeros``; zeros where the network does not take
    others.

    tokens: as in ``Model``.
    """
    draw = rng(0, "trial")
    numbers = partial(torch.randint, tokens) if tokens else torch.randn
    x, other = (numbers(zeros.shape, generator=draw) for _ in range(2))
    try:
        with torch.no_grad(), isolated(0, "trial"), _noise(True):
            duplicate(module).train()(x.clone())
    except Exception:
        return zeros, zeros
    return x, other


def _noise(training: bool) -> AbstractContextManager:
    """What a pass runs under: in a run, too, evaluation knows no noise."""
    return Substitutes(None, torch.tensor(0)) if training else nullcontext()


def _watched(module: nn.Module, leaves: _Leaves, training: bool, x: Tensor) -> _Pass:
    """A forward pass, whose writing to leaves is undone.

    Raises ValueError when it draws from a global generator.
    """
    given, before, states = x.clone(), remembered(module, leaves.unset), global_states()
    with refusing(x.shape[1:]), _noise(training), Copying() as copying:
        logits = module.train(training)(given).clone()
    for owner, state in global_states().items():
        if state != states[owner]:
            mode = "training" if training else "evaluation"
            raise ValueError(
                f"name: a forward pass in {mode} draws random numbers from {owner} global "
                f"generator, {_ELSEWHERE}; {_KEYED}"
            )
    after = remembered(module, leaves.unset)
    return _Pass(
        training, logits, before, after, *leaves.put_back(), not _same(given, x), copying.met
    )


def _compare(one: _Pass, again: _Pass) -> None:
    """Raise ValueError unless two passes on the same leaves and input did the same."""
    mode = "training" if one.training else "evaluation"
    changed = _changed(one.after, again.after)
    own = {name for each in (one, again) for name in _changed(each.before, each.after)}
    for name in (
        name for name in changed if name in own and name in one.after and name in again.after
    ):
        kinds = {memory[name].kind for memory in (one.after, again.after) if name in memory}
        at = name.rpartition(" ")[2].rpartition(".")[2]
        if "generator" in kinds:
            raise ValueError(
                f"name: a forward pass in {mode} draws random numbers from {name}, a generator of "
                f"its own, {_ELSEWHERE}; {_KEYED}"
            )
        if kinds & {"number", "array"}:
            raise ValueError(
                f"name: a forward pass in {mode} changes {name} each time, which counts "
                f"differently on other ranks and after a resume; {_FLOAT_BUFFER.format(at)}"
            )
    if not _same(one.logits, again.logits):
        found = [*changed, *_changed(one.before, again.before)]
        if found:
            at = found[0].rpartition(" ")[2].rpartition(".")[2]
            raise ValueError(
                f"name: a forward pass in {mode} depends on {found[0]}, which earlier passes "
                f"change; register_buffer {at!r} as floats and write to it in place in training "
                f"(self.{at}.copy_(...)), or leave it out"
            )
        raise ValueError(
            f"name: two forward passes in {mode} with the same weights on the same input give "
            f"different results, as of a clock or of random numbers of its own; {_KEYED}"
        )


def _changed(one: Memory, other: Memory) -> list[str]:
    """What differs, by name."""
    return [name for name in (one | other) if one.get(name) != other.get(name)]


def _owners(module: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """The submodules to which these attributes belong."""
    layers, found = dict(module.named_modules()), set()
    for name in names:
        kind, _, path = name.partition(" ")
        while kind in ("attribute", "buffer") and path:
            path = path.rpartition(".")[0]
            if path in layers:
                found.add(path)
                break
    return frozenset(found)


def _moved(value: Tensor, parameter: bool, number: int) -> Tensor:
    """Other numbers than ``value``: of a parameter about it, of a buffer a little nearer to zero."""
    share = (
        torch.linspace(0, 1, value.numel(), dtype=value.dtype).roll(7919 * number).view(value.shape)
    )
    return value * (1 + 0.1 * share) + 0.01 * share if parameter else value * (1 - 0.1 * share)


def _elsewhere(module: nn.Module) -> str:
    """Why a pass has other weights than those it is given."""
    own = {id(v): name for name, v in module.named_parameters()}
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            held = value.values() if isinstance(value, dict) else value
            if name.startswith("_") and name in ("_parameters", "_buffers", "_modules"):
                continue
            for tensor in held if isinstance(held, list | tuple | type({}.values())) else [held]:
                if id(tensor) in own:
                    where = f"{path}.{name}".lstrip(".")
                    return (
                        f"attribute {where} holds parameter {own[id(tensor)]} a second time, "
                        "which then does not follow the clients' weights; use nn.ParameterList, "
                        "nn.ParameterDict, or the parameter's own name"
                    )
    return (
        "a forward pass takes weights from elsewhere than the module's parameters and buffers (a "
        "function made in __init__ that holds a layer, a copy of a parameter?), so that it does "
        "not follow the clients' weights; read them as self.NAME in forward"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    top = b.nan_to_num(0, 0, 0).abs().max() if b.numel() else 0
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=0, atol=_ROUNDING * float(top), equal_nan=True
    )
