"""FedAvg whose clients fine-tune the model they received before they use it (FedAvg+FT).

Wang et al., "Federated Evaluation of On-device Personalization", 2019,
https://arxiv.org/abs/1910.10252; Yu et al., "Salvaging Federated Learning by Local Adaptation",
2020, https://arxiv.org/abs/2002.04758, section 3.1. Training is that of FedAvg:

    w    <-  sum_k (n_k / n) w_k
    w_k' <-  argmin L_k from w, ft_epochs epochs    only to be evaluated; neither sent nor kept

BatchNorm: running statistics are averaged. Fine-tuning updates those of its copy.

Bytes per client and round: all leaves up, all leaves down.

Deviations: fine-tuning uses the settings of ``train`` and the batches of the next round's training.
With ft_epochs = train.epochs it equals the next round's local training before the mean.
"""

from dataclasses import dataclass

from ..algorithm import LocalTraining, Phase, Step
from ..components.averaging import Averaging
from ..core.bounds import bounded
from ..models.network import Model


@dataclass(frozen=True)
class FedAvgFT(Averaging):
    """FedAvg with SGD on all leaves before every evaluation."""

    # [epochs] fine-tuning before an evaluation; default: our choice, the default train.epochs
    ft_epochs: int = 5

    def __post_init__(self) -> None:
        bounded(self, ft_epochs="[0, inf)")

    def personalize(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase, ...]:
        return (Phase(self.ft_epochs, (Step(self.loss(model)),)),)
