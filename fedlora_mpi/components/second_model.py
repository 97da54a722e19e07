"""A second model of each client, v_i, which trains beside the shared one on the same batches.

Its leaves are the personal leaves "own.<leaf>".
"""

from torch import Tensor

from ..algorithm import Batch, Loss, Step, Variables
from ..core.names import method_leaf_name
from ..models.network import Model

OWN = method_leaf_name("own")


def train_beside(model: Model, own_loss: Loss) -> tuple[Step, Step]:
    """The steps of v_i on ``own_loss``, and then of the shared model on the loss of the config.

    v_i steps first, since its loss may read the shared model. That of the shared model does not
    read v_i.
    """
    parameters = {n for n in model.leaves if model.role(n) != "stats"}
    own_parameters = {OWN + n for n in parameters}

    def shared_loss(now: Variables, start: Variables, batch: Batch) -> Tensor:
        return model.loss(model(now.shared, batch.x), batch)

    return Step(own_loss, own_parameters.__contains__), Step(shared_loss, parameters.__contains__)
