"""``reproduce fedhl``: clients of unequal ranks fine-tune a backbone trained here on half of the
classes.

Only the abstract of the FedHL paper (see ``algorithms/fedhl.py``) was available; its claim is
``paper.FEDHL``. The ranks are those of FLoRA's experiments. Networks, split and training are ours.
The backbone needs no external file: ``fedlora-mpi pretrain`` trains it on the first half of the
classes. Then all classes are federated.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import paper
from .backbones import make_backbone
from .grid import Case, Entry, Scale, Table
from .results import Result
from .sheet import Cell, Sheet, csv_record, format_accuracy, format_difference, spread_note
from .tuned_sheet import logged_means

TABLE_NAME = "fedhl"
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)  # client k has the (k mod 10)-th rank
ALPHA = 0.5
PARTICIPATION = (1.0, 0.4)
FULL_SCALE = Scale(clients=100, train=500, test=100, batch_size=20, epochs=1, rounds=100)
# An hour and a half on two CPU cores, two runs at a time, for all cases with one seed. A round of
# 10 clients * 200 samples takes from 2 s (narrow) to 6 s (wide) of one core, and 40 % of that at
# participation 0.4.
SMALL_SCALE = FULL_SCALE._replace(clients=10, train=200, test=100, rounds=20)
# Forty minutes on two busy CPU cores for both participations. A training sample is 163 MFLOP and
# takes 6 ms of one core, a test image 3 ms. Each of 13 methods takes 10 * (2,000 * 6 ms + 2 * 1,000
# * 3 ms) = 180 s, and 90 s at participation 0.4; the backbone takes 4 * 25,000 * 7 ms = 700 s.
SMALL_VIT_SCALE = SMALL_SCALE._replace(rounds=10)
LOGGED_COLUMNS = {  # column of the log -> heading
    "effective_clients": "effective clients",
    "lora_truncation": "truncation",
    "lora_bias": "bias",
    "lora_update_bias": "update bias",
}


class Backbone(NamedTuple):
    """A network, its training settings, and the classes on which it is pretrained.

    ``lr``: learning rate of the clients; ``layers``: patterns of the weights that they adapt.
    """

    model: Mapping[str, Any]
    epochs: int
    classes: str
    optimizer: Mapping[str, float]
    lr: float
    layers: tuple[str, ...] = ("*",)


_VIT_SIZES = {"width": 96, "heads": 4, "feedforward": 192}


def _transformer_block(width: int) -> dict[str, Any]:
    return {
        "name": "transformer",
        "width": width,
        "heads": 4,
        "layers": 2,
        "feedforward": 2 * width,
    }


_SGD = {"lr": 0.02, "momentum": 0.9}
# data set -> network; in the wide networks and the vit no client's rank holds a whole weight
# on CIFAR-10, FedHL with ``weight_mode: fedhera`` diverges at a rate of 0.05
BACKBONES: dict[str, dict[str, Backbone]] = {
    "cifar10": {
        "narrow": Backbone({"name": "cnn", "width": 16, "hidden": 64}, 5, "0-4", _SGD, 0.02),
        "wide": Backbone({"name": "cnn", "width": 32, "hidden": 256}, 5, "0-4", _SGD, 0.02),
        "vit": Backbone(
            {"name": "vit", "patch": 4, "layers": 6, **_VIT_SIZES},
            4,
            "0-4",
            _SGD,
            0.05,
            ("*.in_proj_weight:q", "*.in_proj_weight:v"),
        ),
    },
    "ag_news": {
        "narrow": Backbone(_transformer_block(64), 2, "0-1", _SGD, 0.05),
        "wide": Backbone(_transformer_block(128), 1, "0-1", _SGD, 0.05),
    },
}
WIDTHS = ("narrow", "wide")
MODELS = {"cnn": WIDTHS, "vit": ("vit",)}  # --model -> networks of ``BACKBONES``


def named_networks(
    data: Sequence[str], models: Sequence[str], widths: Sequence[str]
) -> list[tuple[str, str]]:
    """Return (data set, network of ``BACKBONES``) for the options of a command line.

    An empty option means its default: all data sets of its networks, cnn, both widths.
    Raises ValueError if the networks have no such width.
    """
    models = models or ("cnn",)
    if widths and "cnn" not in models:
        raise ValueError(f"--width = {widths[0]}: {models[0]} has one width; leave it out")
    networks = [n for m in models for n in (widths if m == "cnn" and widths else MODELS[m])]
    return [
        (name, network)
        for name in data or BACKBONES
        for network in networks
        if data or network in BACKBONES[name]
    ]


def text_difference(data: str, train_file: str) -> str:
    """How the training texts differ from those of full scale; "" if they do not."""
    is_partial = data == "ag_news" and train_file != "train.csv"
    return f"training texts of {train_file} (full scale all 120,000)" if is_partial else ""


@dataclass(frozen=True)
class FineTuningCase(Case):
    """``network`` names one of ``BACKBONES``; ``folder`` holds their weights. ``train_file`` is the
    file with the training texts in the folder AG_NEWS.
    """

    network: str
    participation: float
    folder: Path
    alpha: float = ALPHA
    train_file: str = "train.csv"
    full_scale_source: ClassVar[str] = "full scale"

    def __post_init__(self) -> None:
        if self.data not in BACKBONES:
            raise ValueError(f"--data = {self.data}: {TABLE_NAME} has {', '.join(BACKBONES)}")
        if self.network not in BACKBONES[self.data]:
            raise ValueError(
                f"--model = {self.network}: is for images; leave it out for {self.data}"
            )
        if not 0 < self.participation <= 1:
            raise ValueError(
                f"--participation = {self.participation:g}: must be above 0 and at most 1"
            )

    @property
    def name(self) -> str:
        return f"{self.data}-{self.network}-part{self.participation:g}-alpha{self.alpha:g}"

    @property
    def description(self) -> str:
        return (
            f"{self.data}, {self.network} network, {100 * self.participation:g} % of the clients a "
            f"round, alpha {self.alpha:g}"
        )

    @property
    def data_difference(self) -> str:
        return text_difference(self.data, self.train_file)

    def scale_sizes(self, scale: str) -> Scale:
        if scale == "full":
            return FULL_SCALE
        return SMALL_VIT_SCALE if self.network == "vit" else SMALL_SCALE

    @property
    def source(self) -> dict[str, Any]:
        text = {"text": {"vocabulary": 20000, "length": 64, "train": self.train_file}}
        return text if self.data == "ag_news" else {}

    @property
    def split(self) -> dict[str, Any]:
        return {"kind": "dirichlet_client", "alpha": self.alpha}

    @property
    def backbone(self) -> Backbone:
        """The backbone with which the runs of this case start."""
        return BACKBONES[self.data][self.network]

    @property
    def weights(self) -> Path:
        """The file of ``backbone``."""
        suffix = f"-{Path(self.train_file).stem}" if self.data_difference else ""
        return self.folder / f"{self.data}-{self.network}{suffix}.safetensors"

    @property
    def model(self) -> dict[str, Any]:
        return {**self.backbone.model, "weights": str(self.weights)}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": self.backbone.lr, "momentum": 0.9}

    def prepare(self, root: str, download: bool, report: Callable[[str], None]) -> None:
        backbone = self.backbone
        data = {"dataset": self.data, "root": root, "download": download, **self.source}
        train = {"epochs": backbone.epochs, "batch_size": 50, **backbone.optimizer}
        make_backbone(self.weights, data, backbone.model, train, report, backbone.classes)


_ON_SERVER = {"judged": "server"}
_COMMON_SCALE = _ON_SERVER | {"scale": "common"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # key -> label, settings; "-" begins a variant
    "fedit": ("FedIT", _ON_SERVER),
    "flexlora": ("FlexLoRA", _COMMON_SCALE),
    "fedhl": ("FedHL", _COMMON_SCALE),
    "fedhl-fedhera": ("FedHL, weights 1 / t^2", _COMMON_SCALE | {"weight_mode": "fedhera"}),
    "fedhl-relative": (
        "FedHL, eps 0.01 of W^4",
        _COMMON_SCALE | {"weight_mode": "fedhera", "eps_relative": 0.01},
    ),
    "fedhl-samples": ("FedHL, weights n_k", _COMMON_SCALE | {"weight_mode": "samples"}),
    "fedhl-uniform": ("FedHL, equal weights", _COMMON_SCALE | {"weight_mode": "uniform"}),
    "fedhl-inverse": ("FedHL, weights 1 / t", _COMMON_SCALE | {"weight_mode": "inverse"}),
    "fedex_lora": ("FedEx-LoRA", _ON_SERVER | {"downlink": "factored"}),
    "flora": ("FLoRA", {}),
    "hetlora": ("HetLoRA", _ON_SERVER),
    "ffa_lora": ("FFA-LoRA", _ON_SERVER),
    "rolora": ("RoLoRA", _ON_SERVER),
    "fed_rac_lora": ("Fed-RAC-LoRA", {}),
    "fed_talora": ("Fed-TaLoRA", _ON_SERVER | {"downlink": "factored"}),
}


def lora_entries(
    keys: Iterable[str], ranks: Sequence[int], participation: float = 1.0, **settings: Any
) -> Iterator[Entry]:
    """An entry for each key of ``METHODS``, with s = 1 for all ranks and with ``settings``."""
    alpha = float(max(ranks, default=1))
    common = {"lora_ranks": list(ranks), "alpha": alpha, "diagnose": True, **settings}
    for key in keys:
        label, own = METHODS[key]
        block = {"name": key.partition("-")[0], **common, **own}
        yield Entry(key, label, block, participation=participation)


def _fedhl_entries(case: FineTuningCase, scale: Scale) -> Iterator[Entry]:
    keys = [key for key in METHODS if key not in ("fedhl-uniform", "fedhl-inverse")]
    layers = list(case.backbone.layers)
    own = {} if layers == ["*"] else {"layers": layers}
    return lora_entries(keys, RANKS, case.participation, **own)


TABLES = {
    TABLE_NAME: Table(
        "FedHL: clients of unequal ranks",
        _fedhl_entries,
        f"ranks {', '.join(map(str, RANKS))}, s = 1 for all of them; frozen backbone trained on "
        "half of the classes, the head is trained in full; all seeds begin with the same "
        "backbone; of the paper only the abstract could be had",
    )
}


def fedhl_sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    results: Mapping[str, Sequence[Result]],
) -> Sheet:
    """A row for each method: accuracy, bytes, and the logged numbers that explain the accuracy."""
    rows = [("", "seeds", "best", "last", "MB up", "MB down", *LOGGED_COLUMNS.values())]
    records = []
    for cell in cells:
        traffic, logged = (
            _traffic(results[cell.entry.key]),
            logged_means(results[cell.entry.key], LOGGED_COLUMNS),
        )
        numbers = [f"{number:.4g}" for number in (*traffic.values(), *logged.values())]
        rows.append(
            (
                cell.entry.label,
                f"{cell.num_seeds}/{seeds}",
                format_accuracy(cell.best),
                format_accuracy(cell.last),
                *numbers,
            )
        )
        records.append(csv_record(cell) | traffic | logged)
    explanations = [
        "accuracy in %: of the server's model, mean over the clients' test data. best: in the "
        "best round, chosen on test data; last: in the last round. MB: all rounds and clients, "
        "float32",
        "means over the rounds: effective clients 1 / sum p_k^2; truncation ||D - D_k||^2 of what "
        "a client gets of the server's update D; bias ||D' - sum p_k D'_k|| of the next D from "
        "the exact mean of what was trained; update bias the same of what training has changed",
        f"ahead of the best other method: the paper {paper.FEDHL}, here {_fedhl_lead(cells)}",
        spread_note(seeds, "the paper's could not be had"),
    ]
    return Sheet(title, caution, [*explanations, *notes], rows, records)


def _traffic(results: Sequence[Result]) -> dict[str, float]:
    """Bytes of a run in millions, up and down: the mean over seeds."""

    def mean_megabytes(name):
        return np.mean([r.rounds[name].sum() for r in results]) / 1e6 if results else np.nan

    return {
        f"megabytes_{direction}": float(mean_megabytes(f"bytes_{direction}"))
        for direction in ("up", "down")
    }


def _fedhl_lead(cells: Sequence[Cell]) -> str:
    """FedHL's best accuracy minus that of the best other method (not its variants), and that
    method's label.
    """
    ours = next((cell for cell in cells if cell.entry.key == TABLE_NAME and cell.num_seeds), None)
    baselines = [
        cell for cell in cells if cell.num_seeds and not cell.entry.key.startswith(TABLE_NAME)
    ]
    if ours is None or not baselines:
        return "-"
    best = max(baselines, key=lambda cell: cell.best.mean)
    return f"{format_difference(ours.best.mean - best.best.mean)} ({best.entry.label})"
