"""Visual prompts: a frozen vision Transformer of which a few further tokens and the head train.

Jia et al., "Visual Prompt Tuning", ECCV 2022, https://arxiv.org/abs/2203.12119, in the shallow form
(VPT-shallow). The tokens z_0, ..., z_L of an image enter the first block. With n prompts these are

    z_0, p_1, ..., p_n, z_1, ..., z_L

So z_0 stays first; it is the class token, if the network has one. Prompts have no positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from ..algorithm import Algorithm, LocalTraining, Variables
from ..core.bounds import bounded
from ..core.escapes import summarize_error
from ..core.names import method_leaf_name
from ..core.seeds import isolate_rng
from ..core.tree import Tree
from ..models.network import Model
from .lowrank import kaiming_uniform

_PROMPTS = method_leaf_name("prompts")


@dataclass(frozen=True)
class PromptTuning(Algorithm):
    """Clients that train their own head and prompts, and share nothing.

    The personal leaf "prompts" [prompts, width] has p_1, ..., p_n. All leaves but these and the
    head keep their initial values, which are never sent nor stored.
    """

    # [tokens] prompts at the input of the first block; 0: the head alone is trained, of any
    # network; default: our choice
    prompts: int = 10

    def __post_init__(self) -> None:
        bounded(self, prompts="[0, inf)")

    def check(self, model: Model, train: LocalTraining) -> None:
        tuned = self.tuned_leaves(model, Generator())
        if not tuned:
            raise ValueError("prompts = 0: the network has no head to train; name it in model.head")
        v = Variables({}, tuned)
        try:
            with torch.no_grad(), isolate_rng(0, "trial"):
                self.logits(model.eval_mode(), v, model.zero_inputs(2))
        except (RuntimeError, IndexError, AssertionError) as error:
            raise ValueError(
                f"prompts = {self.prompts}: the network takes no further tokens "
                f"({summarize_error(error)}); set model.name = vit, or prompts = 0"
            ) from error

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables({}, self.tuned_leaves(model, rng))

    def tuned_leaves(self, model: Model, rng: Generator) -> Tree:
        """Return the initial head and prompts."""
        head = {n: v for n, v in model.initial.items() if model.role(n) == "head"}
        if not self.prompts:
            return head
        _, width = self.first_block(model)
        return head | {_PROMPTS: kaiming_uniform(self.prompts, width, rng)}

    def first_block(self, model: Model) -> tuple[str, int]:
        """Return the name of the module that contains the network's first attention, and the width
        of its tokens.

        Raises ValueError if the network has no tokens of images.
        """
        layers = () if model.tokens else model.modules[False].named_modules()
        attention = ((n, m) for n, m in layers if isinstance(m, nn.MultiheadAttention))
        for name, layer in attention:
            if block := name.rpartition(".")[0]:
                return block, layer.embed_dim
        raise ValueError(
            f"prompts = {self.prompts}: needs a network that makes tokens of images, in blocks with"
            " a torch.nn.MultiheadAttention; set model.name = vit, or prompts = 0"
        )

    def trained_leaves(self, model: Model) -> Callable[[str], bool]:
        """Return the predicate that is true for the names of trained leaves."""
        return lambda leaf: leaf == _PROMPTS or model.role(leaf) == "head"

    def client_model(self, model: Model, v: Variables) -> Tree:
        if self.prompts:
            raise ValueError(
                f"prompts = {self.prompts}: no weights of the network are the client's model, which"
                " has further tokens"
            )
        return self.network_leaves(model, v)

    def network_leaves(self, model: Model, v: Variables) -> Tree:
        """Return the leaves of the network: the frozen ones and the client's head."""
        return model.initial | {n: w for n, w in v.personal.items() if n in model.leaves}

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        network = model.fixed_norm_model if model.training else model
        tree = self.network_leaves(model, v)
        if not self.prompts:
            return network(tree, x)
        prompts = v.personal[_PROMPTS]

        def add_prompts(z: Tensor) -> Tensor:
            assert z.dim() == 3 and len(z) == len(x), f"tokens {list(z.shape)}"
            p = prompts.to(z.dtype).expand(len(z), -1, -1)
            return torch.cat([z[:, :1], p, z[:, 1:]], 1)

        return network.replace_input(tree, x, self.first_block(model)[0], add_prompts)
