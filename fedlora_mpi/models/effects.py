"""What a forward pass does beside giving logits, and how a run lets it do no more than BatchNorm
does.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..core.tree import Tree
from .state import forgetting


class Effects(NamedTuple):
    """What passes do beside giving logits; nothing in an ordinary network."""

    # float buffers that are replaced, where BatchNorm writes in place
    assigned: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()  # that are written to in any mode
    evaluation: frozenset[str] = frozenset()  # leaves that a pass in evaluation mode writes to
    modules: frozenset[str] = frozenset()  # submodules whose plain attributes change
    input: bool = False  # it is written to
    out: bool = False  # some function has an argument out, which torch.func.vmap refuses

    def call(self, module: nn.Module, values: Tree, x: Tensor, training: bool) -> Tensor:
        """Logits of ``module`` with the leaves ``values``, into which only training writes."""
        given, names = (
            dict(values),
            self.modules.intersection(name for name, _ in module.named_modules()),
        )
        if not training:
            given |= {name: _copied(v, x) for name, v in values.items() if name in self.evaluation}
        passed = dict(given)
        with forgetting(module, names), Copying() if self.out else nullcontext():
            logits = functional_call(module, passed, (x.clone() if self.input else x,))
        with torch.no_grad():
            for name in self.assigned.intersection(given) if training else ():
                if passed[name] is not given[name]:  # functional_call says so
                    given[name].copy_(passed[name])
        return logits

    def within(self, submodule: str) -> "Effects":
        """Those of a submodule alone, by its own names."""

        def own(names: frozenset[str]) -> frozenset[str]:
            there = (name for name in names if f"{name}.".startswith(f"{submodule}."))
            return frozenset(name.removeprefix(submodule).removeprefix(".") for name in there)

        names = map(own, (self.assigned, self.parameters, self.evaluation, self.modules))
        return Effects(*names, self.input, self.out)


class Copying(TorchFunctionMode):
    """Gives functions no argument ``out``, as spectral_norm does, and copies their results there."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        out = kwargs.pop("out", None)
        result = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return result if out is None else func(*args, out=out, **kwargs)
        self.met = True
        return out.copy_(result) if out.shape == result.shape else func(*args, out=out, **kwargs)


def _copied(v: Tensor, x: Tensor) -> Tensor:
    """A copy that a pass on ``x`` may write to: under vmap for each client of ``x``."""
    return v + x.new_zeros((), dtype=v.dtype)
