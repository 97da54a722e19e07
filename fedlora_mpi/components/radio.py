"""A radio channel on which the signals of all clients add up, with fading and a receiver's noise.

All draws follow from two kinds of shared leaves: "seed", that of the fading, and
"seed.<parameter>", that of the noise of a parameter. Clients do not receive them.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..core.names import method_leaf_name
from ..core.seeds import derive_key, normal
from ..core.tree import Tree, select_prefix, split
from ..models.network import Model

_SEED = method_leaf_name("seed")


def _parameters(model: Model) -> list[str]:
    """Return the leaves that are sent over the channel: all but running statistics."""
    return [n for n in model.leaves if model.role(n) != "stats"]


def draw_seeds(model: Model, rng: Generator) -> Tree:
    """Return the leaves with the seeds, which differ from each other."""
    names = [_SEED, *(_SEED + n for n in _parameters(model))]
    # float32 counts 2**23 leaves from it exactly
    first = torch.randint(2**23, (), generator=rng)
    return {n: (first + number).float() for number, n in enumerate(names)}


def split_seeds(shared: Tree) -> tuple[Tree, Tree]:
    """Return the leaves with the seeds, and the others."""
    return split(shared, lambda n: n.startswith(_SEED))


def fading_powers(seeds: Tree, clients: Sequence[int], round_: int) -> Tensor:
    """Return |h_k|^2 of these clients in a round, h_k ~ CN(0, 1): [n] float64, of mean 1."""
    keys = [derive_key(int(seeds[_SEED]), "fading", round_, client) for client in clients]
    return torch.stack([normal(torch.tensor(key), (2,)).double().square().mean() for key in keys])


def receiver_noise(seeds: Tree, like: Tree, deviation: float, round_: int) -> Tree:
    """Return Gaussian noise of this standard deviation for every parameter that has a seed.

    It is drawn on the CPU, so that it has the same bits on all devices.
    """
    noise = {}
    for n, seed in select_prefix(seeds, _SEED).items():
        if n:
            key = derive_key(int(seed), "noise", round_)
            noise[n] = (deviation * normal(torch.tensor(key), tuple(like[n].shape))).to(like[n])
    return noise


def update_moments(model: Model, start: Tree, end: Tree) -> Tensor:
    """Return the mean and the standard deviation of the entries of ``end`` - ``start``, without
    running statistics, [2] float64.
    """
    D = torch.cat([(end[n] - start[n]).flatten() for n in _parameters(model)]).double()
    return torch.stack([D.mean(), D.std(correction=0)])
