"""Side effects of a forward pass, and how a run restricts them to those of BatchNorm."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.tree import Tree
from .state import restore_attributes
from .ties import call_with_leaves


class Effects(NamedTuple):
    """The side effects of passes of a network; an ordinary network has none."""

    # float buffers that a pass replaces by another tensor (BatchNorm writes in place)
    reassigned_leaves: frozenset[str] = frozenset()
    written_parameters: frozenset[str] = frozenset()  # parameters written to in either mode
    # leaves that a pass in evaluation mode writes to
    written_in_evaluation: frozenset[str] = frozenset()
    stateful_modules: frozenset[str] = frozenset()  # submodules whose plain attributes change
    writes_input: bool = False  # a pass writes to its input
    uses_out: bool = False  # some function has an argument ``out``, which torch.func.vmap refuses

    def run_module(self, module: nn.Module, values: Tree, x: Tensor, training: bool) -> Tensor:
        """Return the logits of ``module`` with the leaves ``values``.

        Side effects on ``values`` are kept in training and discarded in evaluation.
        """
        leaves, names = (
            dict(values),
            self.stateful_modules.intersection(name for name, _ in module.named_modules()),
        )
        if not training:
            leaves |= {
                name: _writable_copy(v, x)
                for name, v in values.items()
                if name in self.written_in_evaluation
            }
        passed_leaves = dict(leaves)
        with (
            restore_attributes(module, names),
            OutArgumentMode() if self.uses_out else nullcontext(),
        ):
            logits = call_with_leaves(
                module, passed_leaves, (x.clone() if self.writes_input else x,)
            )
        with torch.no_grad():
            for name in self.reassigned_leaves.intersection(leaves) if training else ():
                if passed_leaves[name] is not leaves[name]:  # the pass has reassigned it
                    leaves[name].copy_(passed_leaves[name])
        return logits

    def for_submodule(self, submodule: str) -> "Effects":
        """Return the side effects of a submodule alone, with names relative to it."""

        def relative_names(names: frozenset[str]) -> frozenset[str]:
            inside = (name for name in names if f"{name}.".startswith(f"{submodule}."))
            return frozenset(name.removeprefix(submodule).removeprefix(".") for name in inside)

        return Effects(
            relative_names(self.reassigned_leaves),
            relative_names(self.written_parameters),
            relative_names(self.written_in_evaluation),
            relative_names(self.stateful_modules),
            self.writes_input,
            self.uses_out,
        )


class OutArgumentMode(TorchFunctionMode):
    """Calls functions without the argument ``out`` and copies the result there.

    spectral_norm uses ``out``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met_out = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        out = kwargs.pop("out", None)
        result = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return result if out is None else func(*args, out=out, **kwargs)
        self.met_out = True
        return out.copy_(result) if out.shape == result.shape else func(*args, out=out, **kwargs)


def _writable_copy(v: Tensor, x: Tensor) -> Tensor:
    """Return a copy that a pass on ``x`` may write to; under vmap, one copy per client of ``x``."""
    return v + x.new_zeros((), dtype=v.dtype)
