"""The table of the pFedLoRA paper (see ``algorithms/pfedlora.py``). Of the paper's numbers only
``paper.PFEDLORA`` was available.

Networks, training settings and split are those of the released code of later papers by the same
authors (FedGH, pFedES). These papers say that they follow pFedLoRA's experiments.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from ..algorithms.pfedlora import PFedLoRA
from .grid import Case, Entry, Scale, Table
from .paper import PFEDLORA

TABLE_NAME = "pfedlora"
# clients -> fraction of them per round; 10 clients train in every round
PARTICIPATION = {10: 1.0, 50: 0.2, 100: 0.1}
CLASSES_PER_CLIENT = {"cifar10": 2, "cifar100": 10}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
# per cent; the paper's values from memory, not checked
PAPER_TARGET = {"cifar10": 90.0, "cifar100": 50.0}
# 25 minutes on two CPU cores, two runs at a time, for 10 clients and one seed on CIFAR-10.
# Standalone trains 10 clients * 400 samples * 2 epochs in 3.1 s of one core. LG-FedAvg, FD and
# FedProto take as long, pFedLoRA 3.9 s, FML 4.8 s, FedAPEN 6.6 s, FedKD 7.3 s. So the rounds take
# 60 rounds * 35 s / 2 cores = 18 min. The start and the wait for the last run take 3 min.
# With 50 and 100 clients, 10 also train in a round; only evaluation takes 5 and 10 times as long.
SMALL_SIZES = {"train": 400, "test": 100, "batch_size": 50, "epochs": 2, "rounds": 60}
# With --samples, an epoch has at least 5 batches: of 50 samples, batches of 10. At small scale, 4
# epochs of them are 20 steps a round, as in the authors' experiment with 50 clients: 10 epochs of
# 50,000 * 0.8 / 50 = 800 samples in batches of 512.
# On busy cores, a round of 50 clients with 50 samples took 2.8 s of one core (Standalone), 4.3 s
# (pFedLoRA), 5.5 s (FML), 7.4 s (FedKD) and 7.7 s (FedAPEN).
MIN_BATCHES = 5
EPOCHS_OF_SAMPLES = 4
FIVE_CNNS = tuple(f"cnn{number}" for number in range(1, 6))
NUM_FEATURES = 500  # of each of the five CNNs: what enters the head
LABELS = {
    "fedavg": "FedAvg",
    "local": "Standalone",
    "lg_fedavg": "LG-FedAvg",
    "fd": "FD",
    "fedproto": "FedProto",
    "fml": "FML",
    "fedkd": "FedKD",
    "fedapen": "FedAPEN",
    TABLE_NAME: "pFedLoRA",
}


@dataclass(frozen=True)
class ClientCounts(Case):
    """``clients`` determines the fraction that takes part. With ``homogeneous`` all clients have
    CNN-1. Each client has ``classes`` classes (None: as in the paper) and at most ``samples``
    training samples (None: those of the scale). pFedLoRA has a row for each place and rank of its
    adapter; no place or rank means the method's default.
    """

    clients: int
    homogeneous: bool = False
    classes: int | None = None
    samples: int | None = None
    adapter_places: tuple[str, ...] = ()
    adapter_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.data not in CLASSES_PER_CLIENT:
            raise ValueError(f"--data = {self.data}: pfedlora has {', '.join(CLASSES_PER_CLIENT)}")
        if self.clients not in PARTICIPATION:
            raise ValueError(
                f"--clients = {self.clients}: pfedlora has {', '.join(map(str, PARTICIPATION))}"
            )
        if not 1 <= self.classes_per_client <= NUM_CLASSES[self.data]:
            allowed = f"from 1 to {NUM_CLASSES[self.data]}, the classes of {self.data}"
            raise ValueError(f"--classes = {self.classes}: must be {allowed}")
        if self.samples is not None and self.samples < self.classes_per_client:
            allowed = f"at least {self.classes_per_client}, one for each class of a client"
            raise ValueError(f"--samples = {self.samples}: must be {allowed}")
        for rank in self.adapter_ranks:
            if rank < 1:
                raise ValueError(f"--adapter-rank = {rank}: must be at least 1")

    @property
    def classes_per_client(self) -> int:
        """How many classes a client has."""
        return CLASSES_PER_CLIENT[self.data] if self.classes is None else self.classes

    @property
    def data_difference(self) -> str:
        papers = CLASSES_PER_CLIENT[self.data]
        if self.classes_per_client == papers:
            return ""
        return f"classes per client {self.classes} (paper {papers})"

    @property
    def name(self) -> str:
        parts = [self.data, f"clients{self.clients}"]
        parts += ["cnn1"] if self.homogeneous else []
        parts += [f"classes{self.classes}"] if self.data_difference else []
        parts += [f"samples{self.samples}"] if self.samples else []
        return "-".join(parts)

    @property
    def description(self) -> str:
        parts = [self.data, f"{self.clients} clients", f"{100 * self.participation:g} % a round"]
        parts += ["all CNN-1" if self.homogeneous else "five CNNs"]
        parts += [f"{self.classes} classes a client"] if self.data_difference else []
        parts += [f"{self.samples} samples a client"] if self.samples else []
        return ", ".join(parts)

    @property
    def participation(self) -> float:
        """The fraction of the clients that take part in a round."""
        return PARTICIPATION[self.clients]

    @property
    def paper_sizes(self) -> Scale:
        return Scale(self.clients, train=0, test=0, batch_size=512, epochs=10, rounds=500)

    def scale_sizes(self, scale: str) -> Scale:
        sizes = self.paper_sizes
        if scale != "full":
            sizes = sizes._replace(**SMALL_SIZES)
            sizes = sizes._replace(epochs=EPOCHS_OF_SAMPLES) if self.samples else sizes
        if self.samples:
            batch_size = min(sizes.batch_size, max(1, self.samples // MIN_BATCHES))
            sizes = sizes._replace(train=self.samples, batch_size=batch_size)
        return sizes

    @property
    def split(self) -> dict[str, Any]:
        return {
            "kind": "shares",
            "classes_per_client": self.classes_per_client,
            "validation": 0.2,
        }

    @property
    def model(self) -> dict[str, Any]:
        return {"name": FIVE_CNNS[0]} if self.homogeneous else {"mix": list(FIVE_CNNS)}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}


def _pfedlora_entries(case: ClientCounts, scale: Scale) -> Iterator[Entry]:
    for name, label in LABELS.items():
        if name == TABLE_NAME:
            places = case.adapter_places or (PFedLoRA.adapter,)
            for place, rank in product(places, case.adapter_ranks or (PFedLoRA.lora_rank,)):
                yield _pfedlora_entry(place, rank, case.participation)
        elif name != "fedavg" or case.homogeneous:
            block = {"name": name} | ({"energy_rounds": scale.rounds} if name == "fedkd" else {})
            yield Entry(name, label, block, participation=case.participation)


def _pfedlora_entry(place: str, rank: int, participation: float) -> Entry:
    """The row of pFedLoRA with this adapter. Its key is the method's name for the defaults."""
    block: dict[str, Any] = {"name": TABLE_NAME}
    key, label = TABLE_NAME, LABELS[TABLE_NAME]
    if place != PFedLoRA.adapter:
        block["adapter"] = place
        key, label = f"{key}-{place}", f"{label}, adapter {place}"
    if rank != PFedLoRA.lora_rank:
        block["lora_rank"] = rank
        key, label = f"{key}-rank{rank}", f"{label}, rank {rank}"
    return Entry(key, label, block, participation=participation)


def is_pfedlora(entry: Entry) -> bool:
    """Whether this is a row of pFedLoRA, with any adapter."""
    return entry.algorithm["name"] == TABLE_NAME


class AdapterCost(NamedTuple):
    """What the paper's claims about the costs depend on. NaN where unknown."""

    numel: float  # numbers of the adapter
    flops_ratio: float  # FLOPs of a round of pFedLoRA / of FedProto
    rounds_ratio: float  # rounds of FedProto / of pFedLoRA until the target


def implied_by_claims(data: str, flops_ratio: float) -> AdapterCost:
    """What ``paper.PFEDLORA`` implies if both of its ratios are against FedProto in one cell.

    Until the target, a method needs T rounds. In a round, a client computes f FLOPs and sends and
    receives n numbers, the mean of both directions. With c = f_lora / f_proto = ``flops_ratio``:

        T_proto f_proto / (T_lora f_lora) = 11.81    =>    T_proto / T_lora = 11.81 c
        T_proto n_proto / (T_lora n_lora) = 7.41     =>    n_lora = n_proto 11.81 c / 7.41

    c is at least 1, since pFedLoRA trains the same network and an adapter besides: FedProto needs
    at least 11.81 times the rounds. c is 4/3 if the adapter trains for as many epochs as the
    network: a step of the adapter needs a forward pass of the network, a step of the network also a
    backward pass, which takes twice as long. The claims alone give no highest c.

    A client of FedProto sends the means of its m classes and receives those of all K, each of
    d = 500 numbers: n_proto = (m + K) d / 2.

        CIFAR-10    m = 2,  K = 10     n_proto =  3,000    n_lora = c  4,781: up to  6,375 for 4/3
        CIFAR-100   m = 10, K = 100    n_proto = 27,500    n_lora = c 43,829: up to 58,439 for 4/3

    A client sends and receives the whole adapter, so n_lora is its size. Ours, beside the head, has
    r (d + K) numbers at rank r: 510 r and 600 r.
    """
    rounds_ratio = PFEDLORA["flops"] * flops_ratio
    n_proto = (CLASSES_PER_CLIENT[data] + NUM_CLASSES[data]) * NUM_FEATURES / 2
    return AdapterCost(n_proto * rounds_ratio / PFEDLORA["bytes"], flops_ratio, rounds_ratio)


TABLES = {
    TABLE_NAME: Table(
        "pFedLoRA: accuracy and cost",
        _pfedlora_entries,
        "every method as its file in algorithms/ sets it; accuracy counts all clients, those that "
        "did not take part with what they have (the authors' code: the participants alone); "
        "training images as they are, without augmentation",
        allows_other_methods=True,
    )
}
