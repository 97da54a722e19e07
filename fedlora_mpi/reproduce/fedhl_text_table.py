"""``reproduce fedhl_text``: clients of unequal ranks tune a language model on a topic new to it.

A small GPT learns three of the four topics of AG News. Ten clients tune it on the fourth, whose
words and sentences differ: LoRA of all weights of its blocks; embeddings, norms and head stay
frozen. FedHL's claim (``paper.FEDHL``) can show where the update has a rank far above the smallest
r_k. Beside the methods stand dense fine-tuning of all but the head, and LoRA of each client alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from ..data.source import Source
from ..data.texts import Text
from .backbones import make_backbone
from .fedhl_shift_table import RANKS as RANKS_BY_NAME
from .fedhl_table import lora_entries, text_difference
from .grid import PERPLEXITY, Case, Entry, Scale, Table, Tuning
from .subtopics import SUBTOPIC, TEXT, write_subtopics, write_tokenizer

TABLE_NAME = "fedhl_text"
DATA = "ag_news"
RANKS = RANKS_BY_NAME["low"]
SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"kind": "iid"},
    "subtopics": {"kind": "pathological", "classes_per_client": 1},
}
PRETRAINED_TOPICS, TUNED_TOPIC = "0-2", 3  # World, Sports, Business; Sci/Tech
FULL_SCALE = Scale(clients=10, train=1500, test=190, batch_size=20, epochs=1, rounds=100)
# A run takes 27 s of a core. Two cases of 11 rows, with 7 learning rates and 3 seeds: 220 runs,
# which take 55 minutes of two cores with the backbone.
SMALL_SCALE = FULL_SCALE._replace(train=120, test=50, rounds=10)
TUNING = Tuning((0.06, 0.2, 0.6, 2.0, 4.0, 8.0, 16.0), 1000, PERPLEXITY)
GPT = {
    "name": "gpt",
    "loss": "next_token",
    "width": 64,
    "heads": 4,
    "layers": 3,
    "feedforward": 256,
    "tied": False,  # so that the head can stay frozen while dense fine-tuning moves the embeddings
}
TOKENS, LENGTH = 1000, 32
PRETRAINING = {"epochs": 4, "batch_size": 50, "lr": 0.3, "momentum": 0.9}
KEYS = (
    "fedit",
    "flexlora",
    "fedhl",
    "fedhl-samples",  # also that of equal weights, since all clients have equally many texts
    "fedhl-inverse",
    "fedhl-fedhera",
    "flora",
    "fedex_lora",
    "hetlora",
)
LABELS = {"fedhl": "FedHL, drift", "fedhl-samples": "FedHL, weights n_k (all equal)"}
ADAPTED = ["blocks.*"]  # the weights with LoRA


@dataclass(frozen=True)
class TextCase(Case):
    """``split_name`` is a key of ``SPLITS``. ``folder`` holds tokenizer, texts and backbone.
    ``train_file`` is the file with the training texts in the folder AG_NEWS.
    """

    split_name: str
    folder: Path
    train_file: str = "train.csv"
    full_scale_source: ClassVar[str] = "full scale"

    def __post_init__(self) -> None:
        if self.data != DATA:
            raise ValueError(f"--data = {self.data}: {TABLE_NAME} has {DATA}")

    @property
    def name(self) -> str:
        return f"{self.data}-{self.split_name}"

    @property
    def description(self) -> str:
        splits = {"iid": "iid", "subtopics": "a sub-topic for each client"}
        return f"{self.data}, ranks {', '.join(map(str, RANKS))}, {splits[self.split_name]}"

    @property
    def data_difference(self) -> str:
        return text_difference(self.data, self.train_file)

    def scale_sizes(self, scale: str) -> Scale:
        return FULL_SCALE if scale == "full" else SMALL_SCALE

    @property
    def dataset(self) -> str:
        return "csv"

    def _file(self, suffix: str) -> Path:
        """A file made of the training texts."""
        stem = f"-{Path(self.train_file).stem}" if self.data_difference else ""
        return self.folder / f"{self.data}{stem}-{suffix}"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the pretrained topics."""
        return self._file("tokenizer.json")

    @property
    def texts(self) -> tuple[Path, Path]:
        """The files of the training and the test texts of the tuned topic."""
        return self._file("topic-train.csv"), self._file("topic-test.csv")

    @property
    def weights(self) -> Path:
        """The file of the backbone."""
        return self._file("gpt.safetensors")

    @property
    def source(self) -> dict[str, Any]:
        train, test = self.texts
        files = {"train": train.name, "test": test.name, "tokenizer": str(self.tokenizer)}
        text = {**files, "label": SUBTOPIC, "columns": [TEXT], "length": LENGTH}
        return {"root": str(self.folder), "text": text}

    @property
    def split(self) -> dict[str, Any]:
        return SPLITS[self.split_name]

    @property
    def model(self) -> dict[str, Any]:
        return {**GPT, "weights": str(self.weights)}

    @property
    def optimizer(self) -> dict[str, float]:
        return {"lr": TUNING.rates[0], "momentum": 0.9}

    @property
    def metrics(self) -> tuple[str, ...]:
        return (PERPLEXITY.column,)

    def prepare(self, root: str, download: bool, report: Callable[[str], None]) -> None:
        source = Source(self.data, root=root, download=download, text=Text(train=self.train_file))
        if not self.tokenizer.exists():
            report(f"{self.tokenizer}: {TOKENS} tokens, of the topics {PRETRAINED_TOPICS}")
            topics = range(TUNED_TOPIC)
            write_tokenizer(source, topics, TOKENS, self.tokenizer, self.folder.parent)
        if not all(file.exists() for file in self.texts):
            report(f"{self.texts[0]}: the texts of topic {TUNED_TOPIC}, with sub-topics")
            clients = self.scale_sizes("full").clients
            write_subtopics(source, TUNED_TOPIC, clients, self.texts, self.folder.parent)
        text = {"train": self.train_file, "tokenizer": str(self.tokenizer), "length": LENGTH}
        data = {"dataset": self.data, "root": root, "download": download, "text": text}
        make_backbone(self.weights, data, GPT, PRETRAINING, report, PRETRAINED_TOPICS)


def text_cases(
    data: Sequence[str], splits: Sequence[str], folder: Path, train_file: str
) -> list[Case]:
    """The cases for these choices; an empty sequence means all of them."""
    combinations = product(data or (DATA,), splits or SPLITS)
    return [TextCase(d, split, folder, train_file) for d, split in combinations]


def _entries(case: TextCase, scale: Scale) -> Iterator[Entry]:
    yield Entry("fedbabu", "dense, all but the head", {"name": "fedbabu", "ft_epochs": 0})
    yield Entry("local_lora", f"local LoRA, rank {max(RANKS)}", _local_lora_block(scale))
    for entry in lora_entries(KEYS, RANKS, full=[], layers=ADAPTED):
        yield replace(entry, label=LABELS.get(entry.key, entry.label))


def _local_lora_block(scale: Scale) -> dict[str, Any]:
    """LoRA of each client alone: all epochs train the factors, with s = 1, and none the rest."""
    ranks = {"rank_rule": "official", "linear_rank": max(RANKS), "layers": ADAPTED}
    return {"name": "local_lora", "lora_epochs": scale.epochs, **ranks}


TABLES = {
    TABLE_NAME: Table(
        "FedHL: a language model on a new topic",
        _entries,
        f"GPT of width {GPT['width']} with {GPT['layers']} blocks, {TOKENS} byte pairs, texts of "
        f"{LENGTH} tokens; pretrained on World, Sports and Business, tuned on Sci/Tech; sub-topics "
        "are clusters of TF-IDF weights, a tenth of the texts each; LoRA of all weights of the "
        "blocks, s = 1; dense: FedAvg of all parameters but the head (`fedbabu`); local LoRA: each "
        "client's own model, all with the largest rank; of the paper only the abstract could be "
        "had",
        tuning=TUNING,
    )
}
