"""A mean in which each client counts with a weight that it computes and uploads itself."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Aggregate, Algorithm, Svd, Term, Transport, Update, Upload, Variables
from ..core.names import method_leaf_name
from ..core.tree import Tree

# a power of two: a product with it is exact
LEAST = 2.0**-40
_WEIGHT = method_leaf_name("own", "weight")


@dataclass(frozen=True)
class OwnWeights(Algorithm):
    """FedAvg with the mean w <- sum_i a_i w_i / sum_i a_i, where client i uploads w_i and a_i.

    A weight a_i below ``LEAST`` counts as ``LEAST``, so clients count equally if all are zero. The
    mean of a_i over the cohort goes into the log as ``mean_weight``.
    """

    weights = "uniform"
    metrics = ("mean_weight",)

    @abstractmethod
    def own_weight(self, v: Variables) -> Tensor:
        """a_i >= 0 of a client with these variables after its round, []."""

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(end.shared | {_WEIGHT: self.own_weight(end)})

    def transport(self, client: int, clients: int) -> Transport:
        return Transport(self, expand=_weigh)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        mean_weight = float(aggregate.metrics["weight"])
        return Update(aggregate.mean, server, {"mean_weight": mean_weight})


def _weigh(upload: Upload, shared: Tree, count: int) -> Term:
    """The leaves of an upload and their weight in the mean."""
    mean = {n: v for n, v in upload.mean.items() if n != _WEIGHT}
    a = upload.mean[_WEIGHT].clamp(min=LEAST)
    return Term(mean, weights=dict.fromkeys(mean, a), metrics={"weight": a})
