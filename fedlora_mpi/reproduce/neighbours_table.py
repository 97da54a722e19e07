"""``reproduce neighbours``: methods that FedHL's paper names beside it, under strong label skew.

Their papers report gains over FedAvg, FedProx or SCAFFOLD when each client has few classes.
Networks, split and training are ours and the same for all; each method has a learning rate of its
own. Two methods are decentralised, on a ring. Accuracy is that of the shared model (decentralised:
of each client's own) on each client's test data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from .fedlora_tables import DirichletCase
from .grid import Case, Entry, Scale, Table, Tuning
from .results import Result
from .sheet import Cell, Sheet, spread_note
from .tuned_sheet import late_note, rate_note, tuned_sheet

TABLE_NAME = "neighbours"
DATASETS = ("cifar10", "cifar100")
ALPHAS = (0.05, 0.1)
FULL_SCALE = Scale(clients=100, train=400, test=100, batch_size=50, epochs=5, rounds=300)
# A run of FedAvg, 30 rounds * 10 clients * 200 samples * 2 epochs, takes 45 s of a CPU core without
# AVX512; the decentralised methods take twice and FedGLOMO four times as long.
SMALL_SCALE = FULL_SCALE._replace(clients=10, train=200, epochs=2, rounds=30)
TUNING = Tuning((0.01, 0.03, 0.1, 0.3), 1000)
LABELS = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "fedlc": "FedLC",
    "fedga": "FedGA",
    "fedbc": "FedBC",
    "fedimpro": "FedImpro",
    "fedglomo": "FedGLOMO",
    "bound_weight_like": "Bound-weight-like",
    "ota_ffl_like": "OTA-FFL-like",
    "dpsgd": "D-PSGD, ring",
    "depositum_like": "DEPOSITUM-like, ring",
}
_ON_RING = ("dpsgd", "depositum_like")


@dataclass(frozen=True)
class SkewCase(DirichletCase):
    """A Dirichlet split, with a network and training of this table."""

    full_scale_source: ClassVar[str] = "full scale"

    def __post_init__(self) -> None:
        if self.data not in DATASETS:
            raise ValueError(f"--data = {self.data}: {TABLE_NAME} has {', '.join(DATASETS)}")

    def scale_sizes(self, scale: str) -> Scale:
        return FULL_SCALE if scale == "full" else SMALL_SCALE

    @property
    def model(self) -> dict[str, Any]:
        return {"name": "cnn"}

    @property
    def optimizer(self) -> dict[str, float]:
        # no momentum: SCAFFOLD, FedGLOMO and DEPOSITUM have corrections in its place
        return {"lr": TUNING.rates[0], "momentum": 0.0}


def _entries(case: SkewCase, scale: Scale) -> Iterator[Entry]:
    for name, label in LABELS.items():
        topology = "ring" if name in _ON_RING else None
        yield Entry(name, label, {"name": name}, topology=topology)


TABLES = {
    TABLE_NAME: Table(
        "Methods named beside FedHL: label skew",
        _entries,
        "settings of each method as its file in algorithms/ has them; the papers' networks, splits "
        "and numbers of rounds differ from each other, so there is no published number beside ours",
        allows_other_methods=True,
        tuning=TUNING,
    )
}


def skew_cases(data: Sequence[str], alphas: Sequence[float]) -> list[Case]:
    """The cases for these choices; an empty sequence means cifar10, and all of ``ALPHAS``."""
    return [SkewCase(d, alpha) for d, alpha in product(data or DATASETS[:1], alphas or ALPHAS)]


def skew_sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    results: Mapping[str, Sequence[Result]],
) -> Sheet:
    """The table of a case, beside FedAvg."""
    base = Entry("fedavg", LABELS["fedavg"], {"name": "fedavg"})
    explanations = [
        late_note(base, "the shared model (decentralised: of each client's own)", TUNING.score),
        rate_note(TUNING, cells),
        spread_note(seeds, "no published ± stands beside it"),
        *notes,
    ]
    return tuned_sheet(title, caution, explanations, cells, seeds, results, base, TUNING.score)
