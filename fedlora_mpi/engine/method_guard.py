"""Finds mistakes of a user's method while its hooks are tried: wrong types, writes in place,
misspelt roles.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TypeVar, cast, get_args

from torch import Tensor

from ..algorithm import Algorithm, Batch, Loss, Phase, Step, Variables, Visit
from ..components.decentralised import Decentralised
from ..core.in_place import TreeState
from ..core.names import display_name
from ..core.tree import Tree
from ..models.network import Model, Role

T = TypeVar("T")
_MAX_TEXT = 160  # characters of an exception's message that are printed
_KEY = re.compile(r"[\w.]+ = ")  # a ValueError of a method that names a key of its own


class MethodMistake(ValueError):
    """A mistake of a user's method, without the name of the method."""


class _CheckedRole(str):
    """The role of a leaf, which refuses a comparison with a word that is no role."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        roles: tuple[str, ...] = get_args(Role)
        if isinstance(other, str) and str(other) not in roles:
            matches = get_close_matches(other, roles, n=1)
            raise MethodMistake(
                f'compares a role with "{other}"; roles are {", ".join(roles)}'
                + (f". Did you mean {matches[0]}?" if matches else "")
            )
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def with_checked_roles(model: Model) -> Model:
    """The same network, whose roles raise MethodMistake if a method compares them with a word that
    is no role.
    """
    leaves, frozen_leaves = (
        {n: leaf._replace(role=cast(Role, _CheckedRole(leaf.role))) for n, leaf in tree.items()}
        for tree in (model.leaves, model.frozen_leaves)
    )
    return replace(model, leaves=leaves, frozen_leaves=frozen_leaves)


def is_package_method(method: Algorithm) -> bool:
    """Whether a method's class is one of this package."""
    if isinstance(method, Decentralised):
        method = method.inner
    return type(method).__module__.startswith(f"{__package__.partition('.')[0]}.")


@contextmanager
def only_reads(hook: str, *trees: Tree) -> Iterator[None]:
    """Raise MethodMistake if the block changes one of the ``trees``, which ``hook`` was given."""
    before = [TreeState.of(tree) for tree in trees]
    yield
    for state in before:
        if change := state.describe_change():
            raise MethodMistake(
                f"{hook} {change}, which it was given; return a new tensor in a new tree"
            )


def call(hook: str, function: Callable[[], T], *trees: Tree) -> T:
    """``function()``, which is the user's ``hook`` and may only read ``trees``.

    Raises MethodMistake if it writes or fails. A ValueError that names a key of the method is
    raised as it is.
    """
    try:
        with only_reads(hook, *trees):
            return function()
    except MethodMistake as mistake:
        text = str(mistake)
        raise mistake if text.startswith(hook) else MethodMistake(f"{hook} {text}") from None
    except Exception as error:  # a user's method may raise anything
        if isinstance(error, ValueError) and _KEY.match(str(error)):
            raise
        raise MethodMistake(f"{hook} fails: {describe_failure(error)}") from error


def describe_failure(error: Exception) -> str:
    """An exception of a user's method in one line: type, text, and the last line of the user's own
    code that it passed.
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."
    package, place, frame = Path(__file__).parents[1], "", error.__traceback__
    while frame:
        file = Path(frame.tb_frame.f_code.co_filename)
        if package not in file.parents and "site-packages" not in file.parts:
            place = f" ({file.name}, line {frame.tb_lineno})"
        frame = frame.tb_next
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def describe_type(value: object) -> str:
    """What kind of value a hook has returned."""
    name = type(value).__name__
    return "None" if value is None else f"a{'n' * (name[0] in 'aeiouAEIOU')} {name}"


def need_type(hook: str, value: object, expected: type[T], contract: str) -> T:
    """``value``. Raises MethodMistake if it is no ``expected``; ``contract``: what the hook must
    return.
    """
    if not isinstance(value, expected):
        raise MethodMistake(f"{hook} returns {describe_type(value)}; {contract}")
    return value


def need_trees(hook: str, **trees: Tree) -> None:
    """Raise MethodMistake unless each of the trees that ``hook`` returns is {name: tensor}."""
    for field, tree in trees.items():
        if not isinstance(tree, dict):
            raise MethodMistake(
                f"{hook} returns {describe_type(tree)} as {field}; it must be a dict of tensors"
            )
        for name, value in tree.items():
            if not (isinstance(name, str) and isinstance(value, Tensor)):
                raise MethodMistake(
                    f"{hook} returns {describe_type(value)} as {field}[{name!r}]; it must be a "
                    "tensor under a name"
                )


def need_variables(hook: str, value: object) -> Variables:
    """``value``, which must be ``Variables``."""
    contract = "it must return Variables(shared, personal), each a dict of tensors"
    v = need_type(hook, value, Variables, contract)
    need_trees(hook, shared=v.shared, personal=v.personal)
    return v


def need_layout(what: str, tree: Tree, like: Tree, way_out: str) -> None:
    """Raise MethodMistake unless ``tree`` has the names and shapes of ``like``; ``what``: the tree
    in words, as the subject of a sentence.
    """
    for name in {**like, **tree}:
        shape = list(tree[name].shape) if name in tree else None
        expected = list(like[name].shape) if name in like else None
        if shape == expected:
            continue
        leaf = display_name(name)
        if shape is None:
            difference = f"lacks {leaf}"
        elif expected is None:
            difference = f"has {leaf}, which is none of them"
        else:
            difference = f"has {leaf} of shape {shape} instead of {expected}"
        raise MethodMistake(f"{what} {difference}; {way_out}")


def guard_items(items: Iterable[Phase | Visit]) -> list[Phase | Visit]:
    """The items of a round, whose losses and visits raise MethodMistake as soon as they write to
    what they were given or return another type. For one client, not for a stack.
    """
    return [
        item._replace(
            steps=tuple(step._replace(loss=_guard_loss(step.loss)) for step in item.steps)
        )
        if isinstance(item, Phase)
        else item._replace(apply=_guard_visit(item.apply))
        for item in items
    ]


def _guard_loss(loss: Loss) -> Loss:
    def guarded_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
        # BatchNorm may write to its statistics, which are not trained
        trained = [{n: v for n, v in half.items() if v.requires_grad} for half in now[:2]]
        with only_reads("a loss of local", *trained, *start[:2]):
            value = loss(now, start, batch)
        if not isinstance(value, Tensor) or value.dim():
            kind = (
                f"a tensor of shape {list(value.shape)}"
                if isinstance(value, Tensor)
                else describe_type(value)
            )
            raise MethodMistake(
                f"a loss of local returns {kind}; it must return the mean over the batch, a tensor "
                "without axes"
            )
        return value

    return guarded_loss


def _guard_visit(
    apply: Callable[[Variables, Variables, Batch], Variables],
) -> Callable[[Variables, Variables, Batch], Variables]:
    def guarded_visit(start: Variables, now: Variables, data: Batch) -> Variables:
        hook = "a visit of local"
        with only_reads(hook, *start[:2], *now[:2], _batch_tree(data)):
            value = apply(start, now, data)
        return need_variables(hook, value)

    return guarded_visit


def _batch_tree(batch: Batch) -> Tree:
    """The tensors of a batch under names for messages."""
    return {f".batch.{n}": v for n, v in batch._asdict().items() if v is not None}


def check_items(hook: str, items: object, leaves: Sequence[str]) -> None:
    """Raise MethodMistake unless ``items`` are phases and visits, and each step trains one of the
    ``leaves``.
    """
    contract = "it must return a tuple of Phase and Visit in order of time"
    if isinstance(items, Phase | Visit):
        kind = type(items).__name__
        raise MethodMistake(f"{hook} returns one {kind}; {contract}, such as (phase,)")
    if not isinstance(items, tuple | list):
        raise MethodMistake(f"{hook} returns {describe_type(items)}; {contract}")
    for item in items:
        if not isinstance(item, Phase | Visit):
            raise MethodMistake(f"{hook} returns {describe_type(item)} among its items; {contract}")
    phases = [item for item in items if isinstance(item, Phase)]
    for number, phase in enumerate(phases, 1):
        _check_phase(hook, f"phase {number} of {len(phases)}", phase, leaves)


def _check_phase(hook: str, what: str, phase: Phase, leaves: Sequence[str]) -> None:
    if type(phase.epochs) is not int or phase.epochs < 0:
        raise MethodMistake(
            f"{hook}: {what} has epochs = {phase.epochs!r}; it must be an integer of at least 0"
        )
    steps: object = phase.steps
    is_single = isinstance(steps, Step) or not isinstance(steps, tuple | list)
    if is_single or not all(isinstance(step, Step) for step in phase.steps):
        raise MethodMistake(
            f"{hook}: {what} has steps = {describe_type(steps)}; it must be a tuple of Step, such "
            "as (step,)"
        )
    for number, step in enumerate(phase.steps, 1):
        trained = [n for n in leaves if call(f"{hook}: trains(leaf)", partial(step.trains, n))]
        if phase.epochs and leaves and not trained:
            raise MethodMistake(
                f"{hook}: step {number} of {what} trains no leaf: its trains(leaf) is False for "
                f"all {len(leaves)} of them, such as {leaves[0]}"
            )
