"""Gradient checkpointing: blocks of a network keep their inputs alone and are computed again in the
backward pass (Chen et al. 2016). The numbers are the same; training takes about a third longer.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from .effects import Effects
from .network import Model
from .ties import call_with_leaves, named_tensors


def recompute_blocks(model: Model) -> Model:
    """Return ``model`` whose training passes compute its blocks again for their gradients.

    Blocks are the modules in the outermost lists (nn.ModuleList, nn.Sequential of modules with
    children of their own), such as the layers of a Transformer. Raises ValueError if there are
    none, or if a pass through them changes anything: the second pass would change it again.
    """
    network, body = (copy.deepcopy(pair[True]) for pair in (model.modules, model.bodies))
    names = [name for name, _ in _blocks(network)]
    if not names:
        raise ValueError(
            "gradient_checkpointing = true: the network has no list of blocks to compute again; "
            "false needs none"
        )
    if model.effects != Effects() or any(
        isinstance(layer, _NormBase) for _, block in _blocks(network) for layer in block.modules()
    ):
        raise ValueError(
            "gradient_checkpointing = true: a pass through the network changes it, such as the "
            "statistics of BatchNorm; false computes each block once"
        )
    for module in (network, body):
        for _, block in _blocks(module):
            block.forward = _Recomputed(block)  # type: ignore[method-assign, assignment]
    return replace(
        model,
        modules=(model.modules[False], network),
        bodies=(model.bodies[False], body),
        recomputed=tuple(names),
    )


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the module of each block, in the order of the network."""
    for name, child in module.named_children():
        items = dict(child.named_children())
        is_list = isinstance(child, nn.ModuleList) or (
            isinstance(child, nn.Sequential)
            and all(next(item.children(), None) is not None for item in items.values())
        )
        if is_list and items:
            yield from ((f"{prefix}{name}.{key}", item) for key, item in items.items())
        else:
            yield from _blocks(child, f"{prefix}{name}.")


class _Plain(nn.Module):
    """A block that computes itself, whatever its ``forward`` has become."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class _Recomputed:
    """The ``forward`` of a block that keeps its inputs and leaves alone for its gradient."""

    def __init__(self, block: nn.Module) -> None:
        self._plain = _Plain(block)
        self._names = list(named_tensors(self._plain))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        # those of this pass; the block has lost them when its gradient is computed
        present = named_tensors(self._plain, all_names=True)
        leaves = {name: present[name] for name in self._names}
        return checkpoint(
            lambda *args, **kwargs: call_with_leaves(self._plain, dict(leaves), args, kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # noise is a function of a key, see ``Substitutes``
            context_fn=_pass_contexts,
            **kwargs,
        )


def _pass_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of the first pass, none, and of the second: the present modes.

    A mode with a state, such as the number of the next draw, has that of now.
    """
    return nullcontext(), _enter_all([copy.copy(m) for m in _get_current_function_mode_stack()])


@contextmanager
def _enter_all(modes: list[TorchFunctionMode]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield
