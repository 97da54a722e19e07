"""``reproduce fedhl``: clients of unequal ranks fine-tune a backbone that was trained here on half
of the classes.

Of the FedHL paper (see ``algorithms/fedhl.py``) the abstract is all we have: its claim is
``paper.FEDHL``. Ranks are those of FLoRA's experiments, networks, split and training are ours. The
backbone needs no file from elsewhere: it is ``fedlora-mpi pretrain`` on the first half of the
classes, after which all of them are federated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..config import Config, from_dict
from . import paper
from .grid import Case, Entry, Scale, Table
from .results import Result
from .sheet import Cell, Sheet, record, show, signed, spread

OURS = "fedhl"
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)  # client k of any number has the (k mod 10)-th
ALPHA = 0.5
PARTICIPATION = (1.0, 0.4)
FULL = Scale(clients=100, train=500, test=100, batch_size=20, epochs=1, rounds=100)
# An hour and a half on two CPU cores, two runs at a time, for all of it with one seed: a round of
# 10 clients * 200 samples takes from 2 s (narrow) to 6 s (wide) of a core, 40 % of that at
# participation 0.4.
SMALL = FULL._replace(clients=10, train=200, test=100, rounds=20)
# on CIFAR-10 FedHL with the paper's weights diverges by 0.05
LR = {"cifar10": 0.02, "ag_news": 0.05}
TOLD = {  # column of the log -> heading
    "effective_clients": "effective clients",
    "lora_truncation": "truncation",
    "lora_bias": "bias",
    "lora_update_bias": "update bias",
}


class Backbone(NamedTuple):
    """A network, and how long and on which classes it is trained before."""

    model: Mapping[str, Any]
    epochs: int
    classes: str
    optimizer: Mapping[str, float]


def _texts(width: int) -> dict[str, Any]:
    return {
        "name": "transformer",
        "width": width,
        "heads": 4,
        "layers": 2,
        "feedforward": 2 * width,
    }


# data set -> width -> network; of wide no rank holds a whole weight
BACKBONES: dict[str, dict[str, Backbone]] = {
    "cifar10": {
        "narrow": Backbone(
            {"name": "cnn", "width": 16, "hidden": 64}, 5, "0-4", {"lr": 0.02, "momentum": 0.9}
        ),
        "wide": Backbone(
            {"name": "cnn", "width": 32, "hidden": 256}, 5, "0-4", {"lr": 0.02, "momentum": 0.9}
        ),
    },
    "ag_news": {
        "narrow": Backbone(_texts(64), 2, "0-1", {"lr": 0.02, "momentum": 0.9}),
        "wide": Backbone(_texts(128), 1, "0-1", {"lr": 0.02, "momentum": 0.9}),
    },
}
WIDTHS = ("narrow", "wide")


@dataclass(frozen=True)
class Tuning(Case):
    """``folder``: of the backbones; ``train_file``: of the training texts, in the folder AG_NEWS."""

    width: str
    participation: float
    folder: Path
    alpha: float = ALPHA
    train_file: str = "train.csv"
    whose: ClassVar[str] = "full scale"

    def __post_init__(self) -> None:
        if self.data not in BACKBONES:
            raise ValueError(f"--data = {self.data}: {OURS} has {', '.join(BACKBONES)}")
        if not 0 < self.participation <= 1:
            raise ValueError(
                f"--participation = {self.participation:g}: must be above 0 and at most 1"
            )

    @property
    def name(self) -> str:
        return f"{self.data}-{self.width}-part{self.participation:g}-alpha{self.alpha:g}"

    @property
    def said(self) -> str:
        return (
            f"{self.data}, {self.width} network, {100 * self.participation:g} % of the clients a "
            f"round, alpha {self.alpha:g}"
        )

    @property
    def less(self) -> str:
        part = self.data == "ag_news" and self.train_file != "train.csv"
        return f"training texts of {self.train_file} (full scale all 120,000)" if part else ""

    def at(self, scale: str) -> Scale:
        return FULL if scale == "full" else SMALL

    @property
    def source(self) -> dict[str, Any]:
        text = {"text": {"vocabulary": 20000, "length": 64, "train": self.train_file}}
        return text if self.data == "ag_news" else {}

    @property
    def split(self) -> dict[str, Any]:
        return {"kind": "dirichlet_client", "alpha": self.alpha}

    @property
    def backbone(self) -> Backbone:
        """Where the runs of this case begin."""
        return BACKBONES[self.data][self.width]

    @property
    def weights(self) -> Path:
        """The file of ``backbone``."""
        part = f"-{Path(self.train_file).stem}" if self.less else ""
        return self.folder / f"{self.data}-{self.width}{part}.safetensors"

    @property
    def model(self) -> dict[str, Any]:
        return {**self.backbone.model, "weights": str(self.weights)}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": LR[self.data], "momentum": 0.9}

    def before(self, root: str) -> Config:
        """What ``pretrain`` is given."""
        made = self.backbone
        data = {
            "dataset": self.data,
            "root": root,
            **self.source,
            "partition": {"kind": "iid", "clients": 1},
        }
        train = {"epochs": made.epochs, "batch_size": 50, **made.optimizer}
        mapping = {"data": data, "model": dict(made.model), "algorithm": "fedavg", "train": train}
        return from_dict(mapping, str(self.weights))


def _fedhl(case: Tuning, scale: Scale) -> Iterator[Entry]:
    common = {"lora_ranks": list(RANKS), "alpha": float(max(RANKS)), "diagnose": True}
    server, one = {"judged": "server"}, {"scale": "common"}
    for key, label, more in (
        ("fedit", "FedIT", server),
        ("flexlora", "FlexLoRA", server | one),
        ("fedhl", "FedHL", server | one),
        ("fedhl-relative", "FedHL, eps 0.01 of W^4", server | one | {"eps_relative": 0.01}),
        ("fedhl-samples", "FedHL, weights n_k", server | one | {"weight_mode": "samples"}),
        ("fedex_lora", "FedEx-LoRA", server | {"downlink": "factored"}),
        ("flora", "FLoRA", {}),
        ("hetlora", "HetLoRA", server),
        ("ffa_lora", "FFA-LoRA", server),
        ("rolora", "RoLoRA", server),
        ("fed_rac_lora", "Fed-RAC-LoRA", {}),
        ("fed_talora", "Fed-TaLoRA", server | {"downlink": "factored"}),
    ):
        yield Entry(
            key,
            label,
            {"name": key.partition("-")[0], **common, **more},
            participation=case.participation,
        )


TABLES = {
    OURS: Table(
        "FedHL: clients of unequal ranks",
        _fedhl,
        f"ranks {', '.join(map(str, RANKS))}, s = 1 for all of them; frozen backbone trained on "
        "half of the classes, the head is trained in full; all seeds begin with the same "
        "backbone; of the paper only the abstract could be had",
    )
}


def sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    results: Mapping[str, Sequence[Result]],
) -> Sheet:
    """A row for each method: accuracy, bytes, and the numbers that explain it."""
    rows = [("", "seeds", "best", "last", "MB up", "MB down", *TOLD.values())]
    records = []
    for cell in cells:
        spent, told = _spent(results[cell.entry.key]), _told(results[cell.entry.key])
        numbers = [f"{number:.4g}" for number in (*spent.values(), *told.values())]
        rows.append(
            (cell.entry.label, f"{cell.done}/{seeds}", show(cell.best), show(cell.last), *numbers)
        )
        records.append(record(cell) | spent | told)
    said = [
        "accuracy in %: of the server's model, mean over the clients' test data. best: in the "
        "best round, chosen on test data; last: in the last round. MB: all rounds and clients, "
        "float32",
        "means over the rounds: effective clients 1 / sum p_k^2; truncation ||D - D_k||^2 of what "
        "a client gets of the server's update D; bias ||D' - sum p_k D'_k|| of the next D from "
        "the exact mean of what was trained; update bias the same of what training has changed",
        f"ahead of the best other method: the paper {paper.FEDHL}, here {_lead(cells)}",
        spread(seeds, "the paper's could not be had"),
    ]
    return Sheet(title, caution, [*said, *notes], rows, records)


def _spent(results: Sequence[Result]) -> dict[str, float]:
    """Million bytes of a run, up and down; mean over seeds."""

    def total(name):
        return np.mean([r.rounds[name].sum() for r in results]) / 1e6 if results else np.nan

    return {f"megabytes_{way}": float(total(f"bytes_{way}")) for way in ("up", "down")}


def _told(results: Sequence[Result]) -> dict[str, float]:
    """The columns of ``TOLD``; mean over rounds and seeds."""
    return {
        name: float(np.mean([r.rounds[name] for r in results])) if results else np.nan
        for name in TOLD
    }


def _lead(cells: Sequence[Cell]) -> str:
    """FedHL's best accuracy less that of the best method but its variants, and which this is."""
    ours = next((cell for cell in cells if cell.entry.key == OURS and cell.done), None)
    others = [cell for cell in cells if cell.done and not cell.entry.key.startswith(OURS)]
    if ours is None or not others:
        return "-"
    best = max(others, key=lambda cell: cell.best.mean)
    return f"{signed(ours.best.mean - best.best.mean)} ({best.entry.label})"
