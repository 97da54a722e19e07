"""Count floating-point operations (FLOPs) while they run; a multiply-add counts 2."""

import sys
from contextlib import nullcontext

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.escapes import summarize_error


class _NullModuleTracker(nullcontext):
    """Replaces torch's module tracker.

    The hooks of that tracker raise "A leaf node was passed" if a parameter is the input of a
    module, as in every parametrization.
    """

    parents = frozenset({"Global"})


class FlopCounter(FlopCounterMode):
    """torch's counter of the FLOPs of matrix products and convolutions, forward and backward."""

    def __init__(self) -> None:
        super().__init__(display=False)
        # torch only enters the tracker's context and reads its ``parents``
        self.mod_tracker = _NullModuleTracker()  # type: ignore[assignment]


def forward_with_flops(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return ``module(x)`` and its FLOPs.

    If torch cannot count them, a hint is printed and the FLOPs are taken as 2 for each parameter
    and sample.
    """
    try:
        with FlopCounter() as counter:
            return module(x), counter.get_total_flops()
    except Exception as error:
        logits = module(x)  # raises again if the error is the module's own
        print(
            f"hint: model: FLOPs cannot be counted ({summarize_error(error)}); taken as 2 for each "
            "parameter and sample",
            file=sys.stderr,
            flush=True,
        )
        return logits, 2 * len(x) * sum(v.numel() for v in module.parameters())
