"""What a server receives, for tests of one method's server."""

from fedlora_mpi.aggregation.svd import right_vectors
from fedlora_mpi.algorithm import Aggregate
from fedlora_mpi.mpi.comm import Solo


def aggregate_of(mean, sums=None, metrics=None, round_=0, clients=1, share=1.0, weight=1.0):
    """The aggregate of a cohort: all clients by default, in the first round."""
    return Aggregate(mean, sums or {}, metrics or {}, round_, clients, share, weight)


def svd(matrices):
    """The first right singular vectors of matrices, as one rank computes them."""
    return right_vectors(Solo(), matrices)
