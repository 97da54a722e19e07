"""``reproduce fedhl_shift``: clients of unequal ranks learn an update that no small rank can hold.

FedHL's claim (``paper.FEDHL``) can show where the needed update has a rank far above the smallest
r_k and is carried by LoRA. So the input of a pretrained MLP is turned by a random rotation Q,
common to all clients, and its head stays frozen: the LoRA part of the first weight W has to become
W Q^T - W, which has full rank. Most clients have low ranks. The inputs are 256 features of the data
set (``features``), the MLP is 256-128-classes, pretrained on the features that are not turned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from ..data.source import Source
from ..data.texts import Text
from .backbones import make_backbone
from .features import WIDTH, write_features
from .fedhl_table import lora_entries, text_difference
from .grid import Case, Entry, Scale, Table, Tuning

TABLE_NAME = "fedhl_shift"
RANKS = {  # client k has the (k mod 10)-th rank
    "high": (64, 32, 16, 16, 8, 8, 4, 4, 4, 4),
    "low": (16, 8, 4, 4, 2, 2, 1, 1, 1, 1),
}
ALPHAS = (inf, 0.5)
FULL_SCALE = Scale(clients=100, train=500, test=100, batch_size=20, epochs=1, rounds=200)
# A run of 40 rounds * 10 clients * 300 samples takes 11 s of one core without AVX512, its start not
# included. Eight cases of 8 methods, with 5 learning rates and 3 seeds: 512 runs.
SMALL_SCALE = Scale(clients=10, train=300, test=200, batch_size=20, epochs=1, rounds=40)
RATES = (0.002, 0.005, 0.01, 0.02, 0.05)
TUNING = Tuning(RATES, 1000)
KEYS = (
    "flexlora",
    "fedhl",
    "fedhl-samples",
    "fedhl-inverse",
    "fedhl-fedhera",
    "flora",
    "fedex_lora",
    "hetlora",
)
LABELS = {"fedhl": "FedHL, drift"}
HIDDEN = 128


@dataclass(frozen=True)
class ShiftCase(Case):
    """``ranks`` is a key of ``RANKS``; ``alpha`` that of the Dirichlet split, inf: independent and
    identically distributed. ``folder`` holds features and backbones. ``train_file`` is the file
    with the training texts in the folder AG_NEWS.
    """

    ranks: str
    alpha: float
    folder: Path
    train_file: str = "train.csv"
    full_scale_source: ClassVar[str] = "full scale"

    def __post_init__(self) -> None:
        if self.data not in ("cifar10", "ag_news"):
            raise ValueError(f"--data = {self.data}: {TABLE_NAME} has cifar10, ag_news")

    @property
    def name(self) -> str:
        split = "iid" if self.alpha == inf else f"alpha{self.alpha:g}"
        return f"{self.data}-{self.ranks}-{split}"

    @property
    def description(self) -> str:
        split = "iid" if self.alpha == inf else f"alpha {self.alpha:g}"
        return f"{self.data}, ranks {', '.join(map(str, RANKS[self.ranks]))}, {split}"

    @property
    def data_difference(self) -> str:
        return text_difference(self.data, self.train_file)

    def scale_sizes(self, scale: str) -> Scale:
        return FULL_SCALE if scale == "full" else SMALL_SCALE

    @property
    def dataset(self) -> str:
        return "npz"

    @property
    def features(self) -> Path:
        """The npz file with the features."""
        suffix = f"-{Path(self.train_file).stem}" if self.data_difference else ""
        return self.folder / f"{self.data}{suffix}-features.npz"

    @property
    def weights(self) -> Path:
        """The file of the backbone."""
        return self.features.with_name(f"{self.features.stem}-mlp.safetensors")

    @property
    def source(self) -> dict[str, Any]:
        return {"path": str(self.features), "shift": "rotate_inputs"}

    @property
    def split(self) -> dict[str, Any]:
        is_iid = self.alpha == inf
        return {"kind": "iid"} if is_iid else {"kind": "dirichlet_client", "alpha": self.alpha}

    @property
    def model(self) -> dict[str, Any]:
        return {"name": "mlp", "hidden": HIDDEN, "weights": str(self.weights)}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": RATES[0], "momentum": 0.9}

    def prepare(self, root: str, download: bool, report: Callable[[str], None]) -> None:
        if not self.features.exists():
            report(f"{self.features}: {WIDTH} features of each sample of {self.data}")
            source = Source(self.data, root=root, download=download)
            if self.data == "ag_news":
                text = Text(vocabulary=20000, length=128, train=self.train_file)
                source = replace(source, text=text)
            write_features(source, self.features, self.folder.parent)
        data = {"dataset": "npz", "path": str(self.features)}
        model = {"name": "mlp", "hidden": HIDDEN}
        train = {"epochs": 5, "batch_size": 50, "lr": 0.01, "momentum": 0.9}
        make_backbone(self.weights, data, model, train, report)


def shift_cases(
    data: Sequence[str],
    ranks: Sequence[str],
    alphas: Sequence[float],
    folder: Path,
    train_file: str,
) -> list[Case]:
    """The cases for these choices; an empty sequence means all of them."""
    combinations = product(data or ("cifar10", "ag_news"), ranks or RANKS, alphas or ALPHAS)
    return [ShiftCase(d, r, alpha, folder, train_file) for d, r, alpha in combinations]


def _entries(case: ShiftCase, scale: Scale) -> Iterator[Entry]:
    for entry in lora_entries(KEYS, RANKS[case.ranks], full=[], layers=["1.weight"]):
        yield replace(entry, label=LABELS.get(entry.key, entry.label))


TABLES = {
    TABLE_NAME: Table(
        "FedHL: an update of high rank",
        _entries,
        f"{WIDTH} features (principal components of images, latent semantic components of texts), "
        f"turned by one random rotation; MLP {WIDTH}-{HIDDEN}-classes pretrained on features that "
        "are not turned; LoRA of its first weight alone, s = 1; of the paper only the abstract "
        "could be had",
        tuning=TUNING,
    )
}
