"""Clipping, noise and masks, as an aggregator applies them."""

from dataclasses import dataclass

from torch import Tensor

from ..aggregation.protection import Message, MessageOfClient, Protection
from .clipping import contribution, server_noise
from .masks import masked_messages
from .settings import Privacy


@dataclass(frozen=True)
class PrivateUploads(Protection):
    """What the ``privacy`` block asks for; noise and masks follow from the run's seed."""

    settings: Privacy
    seed: int

    @property
    def is_differential(self) -> bool:  # type: ignore[override]  # read only
        return self.settings.is_differential

    @property
    def sums_modulo(self) -> bool:  # type: ignore[override]  # read only
        return self.settings.secure_aggregation

    def messages(self, message: Message, members: frozenset[int], round_: int) -> MessageOfClient:
        return masked_messages(self.settings, message, members, self.seed, round_)

    def contribution(
        self, reference: Tensor, members: frozenset[int], round_: int, vector: Tensor, client: int
    ) -> Tensor:
        return contribution(
            self.settings, reference, len(members), self.seed, round_, vector, client
        )

    def noise(self, size: int, members: frozenset[int], round_: int) -> Tensor:
        return server_noise(self.settings, size, len(members), self.seed, round_)
