"""How clients count in the mean, for methods whose config chooses it; see ``Algorithm``."""

from dataclasses import dataclass
from typing import Literal

from ..algorithm import Algorithm


@dataclass(frozen=True, kw_only=True)
class Weighting(Algorithm):
    """A method whose config chooses the weights of the mean."""

    weights: Literal["samples", "uniform"] = "samples"


@dataclass(frozen=True, kw_only=True)
class Absence(Algorithm):
    """A method whose config chooses how absent clients count in the mean."""

    absent: Literal["exclude", "stale"] = "exclude"


@dataclass(frozen=True, kw_only=True)
class Averaging(Absence, Weighting):
    """A method whose config chooses both."""
