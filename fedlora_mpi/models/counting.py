"""Floating-point operations, counted as they happen; a multiply-add is 2."""

import sys
from contextlib import nullcontext

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.escapes import summarize_error


class _NullModuleTracker(nullcontext):
    """Replaces torch's tracker of modules, whose hooks raise "A leaf node was passed" when a
    parameter is a module's input, as in every parametrization.
    """

    parents = frozenset({"Global"})


class FlopCounter(FlopCounterMode):
    """torch's counter of matrix products and convolutions, forward and backward."""

    def __init__(self) -> None:
        super().__init__(display=False)
        # of a ModuleTracker torch only enters the context and reads ``parents``
        self.mod_tracker = _NullModuleTracker()  # type: ignore[assignment]


def forward_with_flops(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """``module(x)`` and its FLOPs. If torch cannot count them, a hint is printed and they are taken
    as 2 for each parameter and sample.
    """
    try:
        with FlopCounter() as counter:
            return module(x), counter.get_total_flops()
    except Exception as error:
        logits = module(x)  # raises it again where it is the module's own
        print(
            f"hint: model: FLOPs cannot be counted ({summarize_error(error)}); taken as 2 for each "
            "parameter and sample",
            file=sys.stderr,
            flush=True,
        )
        return logits, 2 * len(x) * sum(v.numel() for v in module.parameters())
