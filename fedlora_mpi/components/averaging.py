"""FedAvg's mean with its two settings."""

from dataclasses import dataclass
from typing import Literal

from ..algorithm import Algorithm


@dataclass(frozen=True, kw_only=True)
class Averaging(Algorithm):
    """A method whose config chooses how clients, present and absent, count in the mean; see
    ``Algorithm``.
    """

    weights: Literal["samples", "uniform"] = "samples"
    absent: Literal["exclude", "stale"] = "exclude"
