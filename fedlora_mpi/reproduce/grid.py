"""Which runs a table of the paper needs, and the config of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import algorithms
from ..blocks import nearest
from ..config import Config, from_dict
from . import paper
from .paper import V

DATA = ("cifar10", "cifar100", "tiny_imagenet")


class Scale(NamedTuple):
    """How much of the paper's experiment is run."""

    clients: int
    train: int  # samples per client
    test: int
    batch_size: int
    rounds: int

    def cut(self) -> str:
        """What differs from the paper, for the header of a table; "" where nothing does."""
        pairs = zip(self._fields, self, FULL, strict=True)
        changes = [f"{name} {ours} (paper {theirs})" for name, ours, theirs in pairs if ours != theirs]
        return ", ".join(changes)


FULL = Scale(clients=40, train=500, test=100, batch_size=100, rounds=300)
# Half an hour on two CPU cores, two runs at a time, for Table 1 with one alpha and one seed on CIFAR-10: FedAvg
# trains 10 clients * 200 samples * 5 epochs in 11 s of a core, the 11 methods together need 12.2 times that, so
# 20 rounds * 12.2 * 11 s / 2 cores = 22 min, and 3 min to start and to wait for the last. By their FLOPs CIFAR-100
# takes 1.5 times as long and Tiny ImageNet 5 times.
SMALL = Scale(clients=10, train=200, test=100, batch_size=50, rounds=20)
SCALES = {"full": FULL, "small": SMALL}


@dataclass(frozen=True)
class Entry:
    """One cell of a table: a method with its settings. ``key`` names its runs."""

    key: str
    label: str  # as the paper writes it
    algorithm: Mapping[str, Any]  # the config's block
    published: V | None = None
    participation: float = 1.0


class Job(NamedTuple):
    """One run: ``config.output`` is its folder."""

    entry: Entry
    data: str
    alpha: float
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def name(self) -> str:
        """``<data>-alpha<alpha>/<key>-seed<seed>``, as in the file names."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def beside(self, suffix: str) -> Path:
        """The file next to the run folder, for instance its config (.yaml)."""
        return self.folder.with_name(self.folder.name + suffix)


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper. ``entries(data, alpha, scale)``: its cells in the paper's order."""

    title: str
    entries: Callable[[str, float, Scale], Iterator[Entry]]
    rule: str  # what the paper leaves open and how it is decided here
    open_to_all: bool = False  # whether --methods may add algorithms that the paper has not


def entries(name: str, data: str, alpha: float, scale: Scale, methods: Sequence[str] = ()) -> list[Entry]:
    """The cells of a table, or those that ``methods`` names, in its order.

    Raises ValueError for a name that is none of them, nor (Table 1) an algorithm.
    """
    table = TABLES[name]
    found = {entry.key: entry for entry in table.entries(data, alpha, scale)}
    known = [*found, *(algorithms.names() if table.open_to_all else ())]
    for method in methods:
        if method not in known:
            what = f"{name} has {', '.join(dict.fromkeys(known))}"
            raise ValueError(f"--methods = {method}: {what}{nearest(method, known)}")
    own = [Entry(m, m, {"name": m}) for m in methods if m not in found]
    return [entry for entry in found.values() if not methods or entry.key in methods] + own


def job(entry: Entry, data: str, alpha: float, seed: int, *, scale: Scale, rounds: int, root: str, folder: Path) -> Job:
    """A run and its config. ``folder``: of the table. Raises ConfigError (a ValueError)."""
    name = f"{data}-alpha{alpha:g}/{entry.key}-seed{seed}"
    partition = {"kind": "dirichlet_client", "alpha": alpha, "seed": seed}
    partition |= {"clients": scale.clients, "train": scale.train, "test": scale.test}
    mapping = {
        "seed": seed,
        "rounds": rounds,
        "participation": entry.participation,
        "output": str(folder / name),
        "data": {"dataset": data, "root": root, "partition": partition},
        "model": {"name": "resnet8" if data == "cifar10" else "resnet10"},
        "algorithm": dict(entry.algorithm),
        "train": {"epochs": 5, "batch_size": scale.batch_size, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
        "checkpoint": {"every": 10, "keep": 1},  # a grid of runs fills a disk
    }
    return Job(entry, data, alpha, seed, from_dict(mapping, f"{name}.yaml"))


# The tables.

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
_CIFAR10_RANKS = {"conv_rank": 0.6, "linear_rank": 4}  # the official README's; its defaults are for CIFAR-100
_RANKS = {
    "cifar10": _CIFAR10_RANKS,
    "cifar100": {"conv_rank": 0.8, "linear_rank": 40},
    "tiny_imagenet": {"conv_rank": 0.8, "linear_rank": 80},  # 40 % of min(512, 200), as for CIFAR-100
}
_OFFICIAL = "ranks and scale of FedLoRA as in the official code, lora_epochs 2"


def _lora(data: str, name: str = "fedlora", **changes: Any) -> dict[str, Any]:
    """FedLoRA, or a variant, as the official code sets it."""
    official = {"name": name, "rank_rule": "official", "scale": "official", "lora_epochs": 2}
    return official | _RANKS[data] | changes


def _method(name: str, data: str, scale: Scale) -> dict[str, Any]:
    """A method of Table 1 with the settings of its authors; schedules in rounds shrink with the scale."""
    shrunk = scale.rounds / FULL.rounds
    if name == "fedcac":
        tau, beta = (0.5, 100) if data == "cifar10" else (0.4, 170)
        return {"name": name, "tau": tau, "beta": beta * shrunk}
    if name == "fedamp":
        return {"name": name, "decay_every": max(1, round(30 * shrunk))}
    return _lora(data) if name == "fedlora" else {"name": name}


def _at(values: Mapping[str, V], data: str, alpha: float) -> V | None:
    return values.get(data) if alpha == 0.1 else None


def _table1(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for name, values in paper.TABLE1.items():
        published = values[data][paper.ALPHAS.index(alpha)] if alpha in paper.ALPHAS else None
        yield Entry(name, LABELS[name], _method(name, data, scale), published)


def _table2(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for r_l, row in zip(paper.RATIOS, paper.TABLE2[data], strict=True):
        for r_c, value in zip(paper.RATIOS, row, strict=True):
            block = {"name": "fedlora", "rank_rule": "paper", "conv_rank": r_c / 100, "linear_rank": r_l / 100}
            label = f"R_l {r_l} %, R_c {r_c} %"
            yield Entry(f"Rl{r_l}-Rc{r_c}", label, block, _at({data: value}, data, alpha))


def _table3(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for order, values in paper.TABLE3.items():
        yield Entry(order, order, _lora(data, order=order), _at(values, data, alpha))


def _table4(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for name, values in paper.TABLE4.items():
        block = _lora(data, name, order="simultaneous") if name.endswith("lora") else {"name": name}
        yield Entry(name, LABELS[name], block, _at(values, data, alpha))


def _table5(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for part, values in paper.TABLE5.items():
        block = _lora(data, absent="stale")
        yield Entry(f"participation{round(100 * part)}", f"{part:.0%} take part", block, _at(values, data, alpha), part)


def _fig4(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for epochs in range(6):
        block = _lora(data, lora_epochs=epochs)
        yield Entry(f"lora_epochs{epochs}", f"E_lora = {epochs}", block)


def _fig6(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for order in paper.TABLE3:
        yield Entry(order, order, _lora(data, order=order))


def _fig7(data: str, alpha: float, scale: Scale) -> Iterator[Entry]:
    for name in ("fedlora", "fedavg", "local"):
        yield Entry(name, LABELS[name], _method(name, data, scale))


TABLES = {
    "table1": Table("Table 1: accuracy of 11 methods", _table1, _OFFICIAL, open_to_all=True),
    "table2": Table("Table 2: FedLoRA's ranks", _table2, "rank_rule paper, scale one, lora_epochs 2"),
    "table3": Table("Table 3: the order of FedLoRA's training", _table3, _OFFICIAL),
    "table4": Table(
        "Table 4: what the low-rank part adds by itself",
        _table4,
        "with LoRA all parts train together, all epochs, and FedAvg averages the factors: the paper does not say",
    ),
    "table5": Table("Table 5: FedLoRA under partial participation", _table5, f"{_OFFICIAL}; absent clients: stale"),
    "fig4": Table("Figure 4: epochs of the low-rank part", _fig4, "ranks and scale as in the official code"),
    "fig6": Table("Figure 6: how far apart the clients train sigma", _fig6, _OFFICIAL),
    "fig7": Table("Figure 7: accuracy of each client", _fig7, _OFFICIAL),
}
