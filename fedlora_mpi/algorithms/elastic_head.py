"""FedPer whose own heads are pulled towards the mean of all heads.

Zhang, Choromanska, LeCun, "Deep Learning with Elastic Averaging SGD", NeurIPS 2015,
https://arxiv.org/abs/1412.6651, eq. (5), here once a round and for the head alone. For client i
with body w and own head h_i, and the mean head h:

    h_i      <- h_i - rho (h_i - h), as the client receives h
    w_i, h_i <- argmin L_i(w, h_i)
    w        <- sum_i (n_i / n) w_i
    h        <- sum_i (n_i / n) h_i

rho = 0 is FedPer, rho = 1 is FedAvg.

BatchNorm: statistics belong to the body and are averaged. Bytes per client and round: all leaves
up, all leaves down. Deviations: the authors move h by rho, too; here h is the mean of the cohort.
"""

from dataclasses import dataclass

from torch import Generator, lerp

from ..algorithm import Batch, LocalTraining, Phase, Step, Upload, Variables, Visit
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..core.names import method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix
from ..models.network import Model

_OWN = method_leaf_name("own")


@dataclass(frozen=True)
class ElasticHead(Averaging):
    """``rho``: the part of the way to the mean head that a client's head goes every round."""

    rho: float = 0.1

    def __post_init__(self) -> None:
        bounded(self, rho="[0, 1]")

    def init(self, model: Model, rng: Generator) -> Variables:
        head = {n: v for n, v in model.initial.items() if model.role(n) == "head"}
        return Variables(shared=model.initial, personal=add_prefix(head, _OWN))

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        step = Step(self.loss(model), lambda leaf: model.role(leaf) != "head")
        return Visit(self.pull), Phase(train.epochs, (step,))

    def pull(self, start: Variables, now: Variables, data: Batch) -> Variables:
        heads = select_prefix(now.personal, _OWN).items()
        pulled = {_OWN + n: lerp(h_i, now.shared[n], self.rho) for n, h_i in heads}
        return now._replace(personal=now.personal | pulled)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(mean=end.shared | select_prefix(end.personal, _OWN))

    def client_model(self, model: Model, v: Variables) -> Tree:
        return v.shared | select_prefix(v.personal, _OWN)

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Visit, ...]:
        return (Visit(self.pull),)
