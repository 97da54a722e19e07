"""The arguments of ``fedlora-mpi reproduce``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..core.paths import expand_home
from . import agnews_row as agnews
from . import fedhl_shift_table as shift
from . import fedhl_table as fedhl
from . import fedhl_text_table as text
from . import neighbours_table as neighbours
from .fedlora_tables import DATASETS, DirichletCase
from .grid import Case
from .pfedlora_table import PARTICIPATION, TABLE_NAME, ClientCounts
from .registry import TABLES


@dataclass(frozen=True)
class Request:
    """The command line. An empty sequence, "" or None means the default.

    data: cifar10; for ``table6`` and ``fedhl_text`` ag_news; for ``fedhl`` and ``fedhl_shift``
    both. alpha: 0.1; for ``table6`` 1.0; for ``fedhl`` 0.5; for ``fedhl_shift`` 0.5 and inf; for
    ``neighbours`` 0.05 and 0.1; not for ``pfedlora`` and ``fedhl_text``.
    text_train: a file in AG_NEWS, for tables that may read it. model, width, participation:
    only for ``fedhl``; lora_ranks: only for ``fedhl_shift``; split: only for ``fedhl_text``;
    default all. clients, homogeneous, classes, samples, adapter, adapter_rank and target (per
    cent): only for ``pfedlora``; clients by default 10, 50, 100 at full scale and 10 at small
    scale; target by default the highest accuracy that all methods reach; for the others see
    ``ClientCounts``. methods: all of the table. rounds: those of the scale. jobs: one per GPU, or
    as many as the CPU cores allow.
    """

    table: str
    data: Sequence[str] = ()
    alpha: Sequence[float] = ()
    clients: Sequence[int] = ()
    text_train: str = ""
    homogeneous: bool = False
    classes: Sequence[int] = ()
    samples: Sequence[int] = ()
    adapter: Sequence[str] = ()
    adapter_rank: Sequence[int] = ()
    model: Sequence[str] = ()
    width: Sequence[str] = ()
    participation: Sequence[float] = ()
    lora_ranks: Sequence[str] = ()
    split: Sequence[str] = ()
    target: Sequence[float] = ()
    seeds: Sequence[int] = ()  # default: 1, 2, 3; at small scale 1, unless rates are tuned
    rounds: int | None = None
    methods: Sequence[str] = ()
    scale: str = "small"
    ranks: int = 1
    jobs: int | None = None
    root: str = "~/data"
    download: bool = False
    output: Path | None = None
    print_jobs: bool = False
    collect: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("ranks", self.ranks), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} = {value}: must be an integer of at least 1")
        if self.scale == "medium" and self.table != "table1":
            raise ValueError("--scale = medium: only table1 has it; choose small or full")
        disallowed: dict[str, object] = {}
        if self.table in (TABLE_NAME, text.TABLE_NAME):
            disallowed["alpha"] = self.alpha
        if self.table != TABLE_NAME:
            disallowed |= {
                "clients": self.clients,
                "homogeneous": self.homogeneous,
                "classes": self.classes,
                "samples": self.samples,
                "adapter": self.adapter,
                "adapter-rank": self.adapter_rank,
                "target": self.target,
            }
        reads_texts = (agnews.TABLE_NAME, fedhl.TABLE_NAME, shift.TABLE_NAME, text.TABLE_NAME)
        if self.table not in reads_texts:
            disallowed["text-train"] = self.text_train
        if self.table != text.TABLE_NAME:
            disallowed["split"] = self.split
        if self.table != shift.TABLE_NAME:
            disallowed["lora-ranks"] = self.lora_ranks
        if self.table != fedhl.TABLE_NAME:
            disallowed |= {
                "model": self.model,
                "width": self.width,
                "participation": self.participation,
            }
        for name, choice in disallowed.items():
            if choice:
                raise ValueError(f"--{name}: {self.table} has no such choice; leave it out")
        if (tuning := TABLES[self.table].tuning) and tuning.seed in self.seeds:
            raise ValueError(
                f"--seeds = {tuning.seed}: with it the learning rates are chosen; give others"
            )

    @property
    def is_full_scale(self) -> bool:
        return self.scale == "full"

    @property
    def cases(self) -> list[Case]:
        """The cases for which the table is made. Raises ValueError if a choice is not allowed."""
        if self.table == agnews.TABLE_NAME:
            file, pairs = (
                self.text_train or agnews.TRAIN_FILE,
                product(self.data or (agnews.DATA,), self.alpha or (agnews.ALPHA,)),
            )
            return [agnews.AgNewsCase(data, alpha, file) for data, alpha in pairs]
        if self.table == fedhl.TABLE_NAME:
            networks = product(
                fedhl.named_networks(self.data, self.model, self.width),
                self.participation or fedhl.PARTICIPATION,
                self.alpha or (fedhl.ALPHA,),
            )
            file = self.text_train or agnews.TRAIN_FILE
            return [
                fedhl.FineTuningCase(*network, participation, self.table_folder, alpha, file)
                for network, participation, alpha in networks
            ]
        if self.table == shift.TABLE_NAME:
            file = self.text_train or agnews.TRAIN_FILE
            folder = self.table_folder
            return shift.shift_cases(self.data, self.lora_ranks, self.alpha, folder, file)
        if self.table == text.TABLE_NAME:
            file = self.text_train or agnews.TRAIN_FILE
            return text.text_cases(self.data, self.split, self.table_folder, file)
        if self.table == neighbours.TABLE_NAME:
            return neighbours.skew_cases(self.data, self.alpha)
        datasets = self.data or ("cifar10",)
        if self.table == TABLE_NAME:
            clients = self.clients or (tuple(PARTICIPATION) if self.is_full_scale else (10,))
            combinations = product(
                datasets, clients, self.classes or (None,), self.samples or (None,)
            )
            adapters = tuple(self.adapter), tuple(self.adapter_rank)
            return [
                ClientCounts(data, number, self.homogeneous, classes, samples, *adapters)
                for data, number, classes, samples in combinations
            ]
        if agnews.DATA in datasets:
            raise ValueError(
                f"--data = {agnews.DATA}: {self.table} has {', '.join(DATASETS)}; texts are "
                f"{agnews.TABLE_NAME}'s"
            )
        return [
            DirichletCase(data, alpha) for data, alpha in product(datasets, self.alpha or (0.1,))
        ]

    @property
    def run_seeds(self) -> Sequence[int]:
        has_three = self.scale != "small" or TABLES[self.table].tuning
        return self.seeds or ((1, 2, 3) if has_three else (1,))

    def rounds_for(self, case: Case) -> int:
        """How many rounds the runs of this case have."""
        return self.rounds or case.scale_sizes(self.scale).rounds

    @property
    def root_folder(self) -> Path:
        return expand_home(self.output or Path("runs") / f"reproduce-{self.scale}").resolve()

    @property
    def table_folder(self) -> Path:
        return self.root_folder / self.table
