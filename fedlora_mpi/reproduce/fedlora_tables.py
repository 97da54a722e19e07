"""The tables and figures of the FedLoRA paper (see ``paper.py``)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import paper
from .grid import Case, Entry, Scale, Table
from .paper import Accuracy

DATASETS = ("cifar10", "cifar100", "tiny_imagenet")

FULL_SCALE = Scale(clients=40, train=500, test=100, batch_size=100, epochs=5, rounds=300)
# Half an hour on two CPU cores, two runs at a time, for Table 1 with one alpha and one seed on
# CIFAR-10. FedAvg trains 10 clients * 200 samples * 5 epochs in 11 s of one core; the 11 methods
# together need 12.2 times that. So the rounds take 20 rounds * 12.2 * 11 s / 2 cores = 22 min. The
# start and the wait for the last run take 3 min. According to the FLOPs, CIFAR-100 takes 1.5 times
# as long and Tiny ImageNet 5 times.
SMALL_SCALE = Scale(clients=10, train=200, test=100, batch_size=50, epochs=5, rounds=20)
# Three seeds and two alphas of Table 1 fit into three hours of two CPU cores, also of cores without
# AVX512: 6 times 20 clients * 100 samples * 12 rounds, 0.6 times a run at small scale.
MEDIUM_SCALE = Scale(clients=20, train=100, test=100, batch_size=50, epochs=5, rounds=12)


@dataclass(frozen=True)
class DirichletCase(Case):
    """``alpha`` is that of the Dirichlet split."""

    alpha: float

    @property
    def name(self) -> str:
        return f"{self.data}-alpha{self.alpha:g}"

    @property
    def description(self) -> str:
        return f"{self.data}, alpha {self.alpha:g}"

    def scale_sizes(self, scale: str) -> Scale:
        return {"full": FULL_SCALE, "medium": MEDIUM_SCALE}.get(scale, SMALL_SCALE)

    @property
    def split(self) -> dict[str, Any]:
        return {"kind": "dirichlet_client", "alpha": self.alpha}

    @property
    def model(self) -> dict[str, Any]:
        return {"name": "resnet8" if self.data == "cifar10" else "resnet10"}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}


LABELS = {
    "fedavg": "FedAvg",
    "local": "Local",
    "fedamp": "FedAMP",
    "fedrep": "FedRep",
    "fedbn": "FedBN",
    "fedper": "FedPer",
    "fedrod": "FedRoD",
    "pfedsd": "pFedSD",
    "pfedgate": "pFedGate",
    "fedcac": "FedCAC",
    "fedlora": "FedLoRA",
    "local_lora": "Local w/ LoRA",
    "fedavg_lora": "FedAvg w/ LoRA",
}
# from the official README; the official defaults are for CIFAR-100
_CIFAR10_RANKS = {"conv_rank": 0.6, "linear_rank": 4}
_RANKS = {
    "cifar10": _CIFAR10_RANKS,
    "cifar100": {"conv_rank": 0.8, "linear_rank": 40},
    # 40 % of min(512, 200), as for CIFAR-100
    "tiny_imagenet": {"conv_rank": 0.8, "linear_rank": 80},
}
_OFFICIAL_NOTE = "ranks and scale of FedLoRA as in the official code, lora_epochs 2"


def _fedlora_block(data: str, name: str = "fedlora", **changes: Any) -> dict[str, Any]:
    """FedLoRA, or a variant of it, with the settings of the official code."""
    official = {"name": name, "rank_rule": "official", "scale": "official", "lora_epochs": 2}
    return official | _RANKS[data] | changes


def _method_block(name: str, data: str, scale: Scale) -> dict[str, Any]:
    """A method of Table 1 with its authors' settings. Schedules that count rounds shrink with the
    scale.
    """
    shrink = scale.rounds / FULL_SCALE.rounds
    if name == "fedcac":
        tau, beta = (0.5, 100) if data == "cifar10" else (0.4, 170)
        return {"name": name, "tau": tau, "beta": beta * shrink}
    if name == "fedamp":
        return {"name": name, "convex": False, "decay_every": max(1, round(30 * shrink))}
    if name == "fedrod":  # as in Fling, to which FedLoRA's authors contribute
        return {"name": name, "personal_trains_body": True}
    return _fedlora_block(data) if name == "fedlora" else {"name": name}


def _published_at(values: Mapping[str, Accuracy], case: DirichletCase) -> Accuracy | None:
    return values.get(case.data) if case.alpha == 0.1 else None


def _table1_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for name, values in paper.TABLE1.items():
        published = (
            values[case.data][paper.ALPHAS.index(case.alpha)]
            if case.alpha in paper.ALPHAS
            else None
        )
        yield Entry(name, LABELS[name], _method_block(name, case.data, scale), published)


def _table2_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for r_l, row in zip(paper.RATIOS, paper.TABLE2[case.data], strict=True):
        for r_c, value in zip(paper.RATIOS, row, strict=True):
            block = {
                "name": "fedlora",
                "rank_rule": "paper",
                "conv_rank": r_c / 100,
                "linear_rank": r_l / 100,
            }
            label = f"R_l {r_l} %, R_c {r_c} %"
            yield Entry(f"Rl{r_l}-Rc{r_c}", label, block, _published_at({case.data: value}, case))


def _table3_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for order, values in paper.TABLE3.items():
        yield Entry(
            order, order, _fedlora_block(case.data, order=order), _published_at(values, case)
        )


def _table4_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for name, values in paper.TABLE4.items():
        block = (
            _fedlora_block(case.data, name, order="simultaneous")
            if name.endswith("lora")
            else {"name": name}
        )
        yield Entry(name, LABELS[name], block, _published_at(values, case))


def _table5_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for part, values in paper.TABLE5.items():
        block = _fedlora_block(case.data, absent="stale")
        yield Entry(
            f"participation{round(100 * part)}",
            f"{part:.0%} take part",
            block,
            _published_at(values, case),
            part,
        )


def _fig4_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for epochs in range(6):
        block = _fedlora_block(case.data, lora_epochs=epochs)
        yield Entry(f"lora_epochs{epochs}", f"E_lora = {epochs}", block)


def _fig6_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for order in paper.TABLE3:
        yield Entry(order, order, _fedlora_block(case.data, order=order))


def _fig7_entries(case: DirichletCase, scale: Scale) -> Iterator[Entry]:
    for name in ("fedlora", "fedavg", "local"):
        yield Entry(name, LABELS[name], _method_block(name, case.data, scale))


TABLES = {
    "table1": Table(
        "Table 1: accuracy of 11 methods",
        _table1_entries,
        _OFFICIAL_NOTE,
        allows_other_methods=True,
    ),
    "table2": Table(
        "Table 2: FedLoRA's ranks", _table2_entries, "rank_rule paper, scale one, lora_epochs 2"
    ),
    "table3": Table("Table 3: the order of FedLoRA's training", _table3_entries, _OFFICIAL_NOTE),
    "table4": Table(
        "Table 4: what the low-rank part adds by itself",
        _table4_entries,
        "with LoRA all parts train together, all epochs, and FedAvg averages the factors: the "
        "paper does not say",
    ),
    "table5": Table(
        "Table 5: FedLoRA under partial participation",
        _table5_entries,
        f"{_OFFICIAL_NOTE}; absent clients: stale",
    ),
    "fig4": Table(
        "Figure 4: epochs of the low-rank part",
        _fig4_entries,
        "ranks and scale as in the official code",
    ),
    "fig6": Table("Figure 6: how far apart the clients train sigma", _fig6_entries, _OFFICIAL_NOTE),
    "fig7": Table("Figure 7: accuracy of each client", _fig7_entries, _OFFICIAL_NOTE),
}
