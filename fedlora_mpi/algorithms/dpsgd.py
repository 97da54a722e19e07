"""Every client trains a model of its own and mixes it with those of its neighbours; no server.

Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for
Decentralized Parallel Stochastic Gradient Descent" (D-PSGD), NeurIPS 2017,
https://arxiv.org/abs/1705.09056, Algorithm 1. Clients are the vertices of a graph (the config's
``topology``), whose mixing matrix W is symmetric and doubly stochastic. In every round, client i:

    x_i' = x_i after ``train.epochs`` epochs of SGD on F_i
    x_i  = sum_j W_ij x_j'                                   over i and its neighbours j

The mean of all x_i moves by the mean of the clients' updates, whatever W. With one step a round
this is X <- (X - lr dF(X)) W, X the matrix of all x_i. On a complete graph it is FedAvg with equal
weights and full participation, to the bit of its exact mean.

BatchNorm: statistics are mixed like parameters. ``fedbn`` over a topology keeps both on the client.

Bytes per client and round: all exchanged leaves, once up and once down for each neighbour.

Deviations: the paper takes one step between two mixes and adds it to the mix of the former models,
X <- X W - lr dF(X); here a client trains first, which lets it take any number of steps. Clients
outside a cohort keep their model; their weight goes to the diagonal of W.
"""

from dataclasses import dataclass

from torch import Generator

from ..algorithm import Algorithm, Mix, Upload, Variables
from ..models.network import Model


@dataclass(frozen=True)
class DPSGD(Algorithm):
    """x_i is personal; no hyper-parameters beyond those of ``train``."""

    weights = "uniform"

    def init(self, model: Model, rng: Generator) -> Variables:
        return Variables(shared={}, personal=model.initial)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(mix=Mix(end.personal, over_topology=True))
