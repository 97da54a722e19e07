"""The AG_NEWS row of the FedLoRA paper's Table 6 (see ``paper.py``): texts and a Transformer with
low-rank parts.

The paper says where the Transformer's low-rank parts are, and nothing else about the Transformer.
Its sizes, training and vocabulary are those of ``configs/agnews.yaml``. The table's other row is
``configs/imagenet_subset.yaml``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from . import paper
from .grid import Case, Entry, Scale, Table

TABLE_NAME = "table6"
DATA = "ag_news"
TRAIN_FILE = "train.csv"
ALPHA = 1.0

FULL_SCALE = Scale(clients=40, train=3000, test=500, batch_size=50, epochs=5, rounds=100)
# A quarter of an hour on two CPU cores, two runs at a time, for one seed. A round of
# 10 clients * 1,000 texts * 3 epochs takes 32 s of one core with each of the 4 methods. So the
# rounds take 15 rounds * 4 * 32 s / 2 cores = 16 min. The start takes 1 min.
SMALL_SCALE = Scale(clients=10, train=1000, test=200, batch_size=20, epochs=3, rounds=15)
LABELS = {"fedavg": "FedAvg", "fedper": "FedPer", "fedrod": "FedRoD", "fedlora": "FedLoRA"}


@dataclass(frozen=True)
class AgNewsCase(Case):
    """``alpha`` is that of the Dirichlet split. ``train_file`` is the file with the training texts
    in the folder AG_NEWS.
    """

    alpha: float = ALPHA
    train_file: str = TRAIN_FILE
    # not "paper": the paper only says on how many texts a client trains
    full_scale_source: ClassVar[str] = "full scale"

    def __post_init__(self) -> None:
        if self.data != DATA:
            raise ValueError(
                f"--data = {self.data}: {TABLE_NAME} has {DATA}; for its other row see "
                "configs/imagenet_subset.yaml"
            )

    @property
    def name(self) -> str:
        return f"{self.data}-alpha{self.alpha:g}"

    @property
    def description(self) -> str:
        return f"{self.data}, alpha {self.alpha:g}"

    @property
    def data_difference(self) -> str:
        return (
            f"training texts of {self.train_file} (paper all 120,000)"
            if self.train_file != TRAIN_FILE
            else ""
        )

    def scale_sizes(self, scale: str) -> Scale:
        return FULL_SCALE if scale == "full" else SMALL_SCALE

    @property
    def source(self) -> dict[str, Any]:
        return {"text": {"vocabulary": 20000, "length": 64, "train": self.train_file}}

    @property
    def split(self) -> dict[str, Any]:
        return {"kind": "dirichlet_client", "alpha": self.alpha}

    @property
    def model(self) -> dict[str, Any]:
        return {"name": "transformer", "width": 64, "heads": 4, "layers": 2, "feedforward": 128}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": 0.02, "momentum": 0.9}


def _fedlora_block(scale: Scale) -> dict[str, Any]:
    """FedLoRA with the low-rank parts of appendix E. They train in two of five epochs."""
    layers = {"layers": ["blocks.*.attention.*", "head.*"]}
    return {
        "name": "fedlora",
        "lora_epochs": round(0.4 * scale.epochs),
        "conv_rank": 0.6,
        "linear_rank": 0.6,
        **layers,
    }


def _table6_entries(case: AgNewsCase, scale: Scale) -> Iterator[Entry]:
    for name, label in LABELS.items():
        published = paper.TABLE6[name][DATA] if case.alpha == ALPHA else None
        yield Entry(
            name, label, _fedlora_block(scale) if name == "fedlora" else {"name": name}, published
        )


TABLES = {
    TABLE_NAME: Table(
        "Table 6: a Transformer on AG_NEWS",
        _table6_entries,
        "the paper has the low-rank parts on self-attention and the classifier and leaves open "
        "the sizes of the Transformer, its training and the ranks (here 60 % of the smaller "
        "side); it says 5 classes, the data have 4",
        allows_other_methods=True,
        std_note="the paper's has none, and does not say over how many seeds",
    )
}
