"""FedPer whose own heads are pulled towards the mean of all heads (Elastic head).

Zhang, Choromanska, LeCun, "Deep Learning with Elastic Averaging SGD", NeurIPS 2015,
https://arxiv.org/abs/1412.6651, eq. (5), here once a round and for the head alone. For client i
with body w and own head h_i, and the mean head h:

    h_i      <- h_i - rho (h_i - h), as the client receives h
    w_i, h_i <- argmin L_i(w_i, h_i), w_i from w
    w        <- sum_i (n_i / n) w_i
    h        <- sum_i (n_i / n) h_i

rho = 0 is FedPer, rho = 1 is FedAvg.

BatchNorm: statistics belong to the body and are averaged. Bytes per client and round: all leaves
up, all leaves down. Deviations: the authors move h by rho, too; here h is the mean of the cohort.
"""

from dataclasses import dataclass

from torch import Generator, lerp

from ..algorithm import Batch, LocalTraining, Phase, Upload, Variables, Visit
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import add_prefix, split
from ..models.network import Model

_MEAN = method_leaf_name("mean")


@dataclass(frozen=True)
class ElasticHead(Averaging):
    """The shared leaves "mean.<leaf>" are h, the personal leaves of the head h_i."""

    # [1] part of the way to the mean head that a client's head goes every round; default: our
    # choice, near FedPer (0), since heads are to stay personal
    rho: float = 0.1

    def __post_init__(self) -> None:
        bounded(self, rho="[0, 1]")

    def init(self, model: Model, rng: Generator) -> Variables:
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        return Variables(shared=body | add_prefix(head, _MEAN), personal=head)

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        return Visit(self.pull), *super().local(model, train, round_)

    def pull(self, start: Variables, now: Variables, data: Batch) -> Variables:
        """Move the client's head towards the mean head."""
        heads = now.personal.items()
        return now._replace(
            personal={n: lerp(h_i, now.shared[_MEAN + n], self.rho) for n, h_i in heads}
        )

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(mean=end.shared | add_prefix(end.personal, _MEAN))

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Visit, ...]:
        return (Visit(self.pull),)
