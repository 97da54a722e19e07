"""Shared variables whose updates travel as truncated SVDs, up and down.

Wu et al., "Communication-Efficient Federated Learning via Knowledge Distillation" (FedKD), Nature
Communications 2022, https://arxiv.org/abs/2108.13323.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm import (
    Aggregate,
    Algorithm,
    Batch,
    Svd,
    Transport,
    Update,
    Upload,
    Variables,
    Visit,
)
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, numel
from ..models.network import Model

_MESSAGE_NUMEL = method_leaf_name("svd", "numbers")


@dataclass(frozen=True)
class SvdExchange(Algorithm):
    """The shared variables g become g + C(mean_k C(g_k - g)); C is ``compress_update``.

    In round t it keeps the share T_t of the energy, which rises from ``energy_start`` to
    ``energy_end`` in ``energy_rounds`` rounds. The leaf "svd.numbers" of the server says how many
    numbers its last message had; before round 1 all of g comes down.
    """

    # [share of the sum of squares] what C keeps before round 1, T_start; default: the authors' code
    energy_start: float = 0.95
    # [share of the sum of squares] what C keeps at last, T_end; default: the authors' code
    energy_end: float = 0.98
    # [rounds] time until T_end, T; default: our choice, all rounds of pFedLoRA's authors, who
    # compare with FedKD (FedKD's code: all rounds)
    energy_rounds: int = 500

    def __post_init__(self) -> None:
        bounded(self, energy_start="[0, 1]", energy_end="[0, 1]", energy_rounds="[1, inf)")

    def energy(self, round_: int) -> float:
        """Return T_t of round t (from 0)."""
        share = min(1, (round_ + 1) / self.energy_rounds)
        return self.energy_start + share * (self.energy_end - self.energy_start)

    def compression(self, round_: int) -> Visit:
        """Return the visit that replaces the trained g by what the server reconstructs from the
        client's message, whose size goes to ``upload`` beside it.
        """

        def compress(start: Variables, now: Variables, data: Batch) -> Variables:
            g, numbers = compress_update(start.shared, now.shared, self.energy(round_))
            return now._replace(shared=g | {_MESSAGE_NUMEL: numbers})

        return Visit(compress)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        g = {n: v for n, v in end.shared.items() if n != _MESSAGE_NUMEL}
        # an untrained client would send all of g
        return Upload(mean=g, numel=end.shared.get(_MESSAGE_NUMEL, numel(g)))

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, download_numel=_message_numel)

    def server(self, model: Model, shared: Tree) -> Tree:
        return {_MESSAGE_NUMEL: torch.tensor(float(numel(shared)))}

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        g, numbers = compress_update(shared, aggregate.mean, self.energy(aggregate.round))
        return Update(g, {_MESSAGE_NUMEL: numbers})


def _message_numel(server: Tree, shared: Tree, round_: int) -> Tensor:
    return server[_MESSAGE_NUMEL]


def compress_update(old: Tree, new: Tree, energy: float) -> tuple[Tree, Tensor]:
    """Return old + C(new - old), and how many numbers the compressed change has, [] float32.

    C keeps vectors as they are; see ``truncate_svd`` for other leaves.
    """
    tree, numbers = dict(new), torch.zeros(())
    for name, old_value in old.items():
        count: Tensor | int = old_value.numel()
        if old_value.dim() > 1:
            update, count = truncate_svd(new[name] - old_value, energy)
            tree[name] = old_value + update
        numbers = numbers + count
    return tree, numbers


def truncate_svd(update: Tensor, energy: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return ``update`` [d1, ...] without its small singular values, and the numbers to send [].

    ``update`` is read as a matrix [d1, d2] = sum_j s_j u_j v_j'. Only s_j, u_j and v_j for j <= n
    are sent, which are n (d1 + d2 + 1) numbers. n >= 1 is the smallest number with sum_{j <= n}
    s_j^2 >= energy sum_j s_j^2. energy: float64.

    The spurious singular values of a rank-deficient matrix are below 1e-8 s_1. Their squares vanish
    in the float64 sum, so n is at most the rank. A non-finite ``update`` is returned unchanged.
    """
    matrix = update.flatten(1).double()
    finite = matrix.isfinite().all()
    # svd raises an error on nan
    U, s, V = torch.linalg.svd(torch.where(finite, matrix, 0.0), full_matrices=False)
    energies = s.square().cumsum(0)
    is_enough = energies[:-1] >= energy * energies[-1]  # the first values suffice
    # a mask, because under vmap every client of a group has its own n
    is_kept = torch.cat([torch.ones_like(finite)[None], ~is_enough])
    approximation = torch.where(finite, (U * (s * is_kept)) @ V, matrix)
    return approximation.to(update.dtype).view(update.shape), is_kept.sum() * (
        sum(matrix.shape) + 1
    )
