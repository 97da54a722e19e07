"""LoRA whose random factor A is frozen, so that the mean of the products is the product of the means.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, https://arxiv.org/abs/2403.12313.
On the weights W_0 + s B A_0, A_0 random and the same on all clients:

    B_k  <-  local training of the server's B, A_0 held still        B  <-  sum_k p_k B_k        p_k = n_k / n

    sum_k p_k s B_k A_0  =  s B A_0

Ranks of clients' own: a client has the first r_k rows of A_0; its B_k counts with zeros up to the largest rank, which
is exact too.
BatchNorm: takes its statistics as they are, unless ``full`` names norm.
Bytes per client and round: 4 (r_k d_out for each decomposed weight, and what is trained in full) up and down; A_0
follows from the seed.
Deviations: the head is trained in full and averaged. Without differential privacy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..algorithm import Vars
from ..finetuning import FineTuning
from ..models.network import Model
from ..tree import Tree, numel


@dataclass(frozen=True)
class FFALoRA(FineTuning):
    """Leaf "<weight>.A" is shared like B, but never moves."""

    def trains(self, model: Model) -> Callable[[str], bool]:
        return lambda leaf: leaf.endswith(".B") or self.is_full(model, leaf)

    def upload(self, start: Vars, end: Vars) -> Tree:
        return _without_a(super().upload(start, end))

    def received(self, shared: Tree) -> int:
        return numel(_without_a(self.download(shared)))


def _without_a(tree: Tree) -> Tree:
    return {n: v for n, v in tree.items() if not n.endswith(".A")}
