"""What ``fedlora-mpi reproduce`` is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..core.paths import expanded
from . import agnews_row as agnews
from . import fedhl_table as fedhl
from .fedlora_tables import DATA, Alpha
from .grid import Case
from .pfedlora_table import OURS, PARTICIPATION, Crowd


@dataclass(frozen=True)
class Request:
    """The command line. Empty ``methods``: all of the table; ``rounds``, ``jobs`` None: by scale,
    by machine.

    data, none: cifar10, of ``table6`` ag_news, of ``fedhl`` both. alpha: of all but ``pfedlora``,
    none: 0.1, of ``table6`` 1.0, of ``fedhl`` 0.5. text_train: of ``table6`` and ``fedhl``, a file
    in AG_NEWS. width, participation: of ``fedhl``, none: all. clients, homogeneous, target (per
    cent): of ``pfedlora``; no clients: 10, 50, 100 at full scale, 10 at small; no target: the
    highest that all methods reach.
    """

    table: str
    data: Sequence[str] = ()
    alpha: Sequence[float] = ()
    clients: Sequence[int] = ()
    text_train: str = ""
    homogeneous: bool = False
    width: Sequence[str] = ()
    participation: Sequence[float] = ()
    target: Sequence[float] = ()
    seeds: Sequence[int] = ()  # none: 1, 2, 3 at full scale, 1 at small
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
        if self.table == OURS:
            foreign = {"alpha": self.alpha}
        else:
            foreign = {
                "clients": self.clients,
                "homogeneous": self.homogeneous,
                "target": self.target,
            }
        if self.table not in (agnews.OURS, fedhl.OURS):
            foreign["text-train"] = self.text_train
        if self.table != fedhl.OURS:
            foreign |= {"width": self.width, "participation": self.participation}
        for name, value in foreign.items():
            if value:
                raise ValueError(f"--{name}: {self.table} has no such choice; leave it out")

    @property
    def full(self) -> bool:
        return self.scale == "full"

    @property
    def cases(self) -> list[Case]:
        """What a table is made for, each. Raises ValueError."""
        if self.table == agnews.OURS:
            file, pairs = (
                self.text_train or agnews.WHOLE,
                product(self.data or (agnews.DATA,), self.alpha or (agnews.ALPHA,)),
            )
            return [agnews.Texts(data, alpha, file) for data, alpha in pairs]
        if self.table == fedhl.OURS:
            ways = product(
                self.data or fedhl.BACKBONES,
                self.width or fedhl.WIDTHS,
                self.participation or fedhl.PARTICIPATION,
                self.alpha or (fedhl.ALPHA,),
            )
            file = self.text_train or agnews.WHOLE
            return [
                fedhl.Tuning(data, width, part, self.folder, alpha, file)
                for data, width, part, alpha in ways
            ]
        images = self.data or ("cifar10",)
        if self.table == OURS:
            clients = self.clients or (tuple(PARTICIPATION) if self.full else (10,))
            return [
                Crowd(data, number, self.homogeneous) for data, number in product(images, clients)
            ]
        if agnews.DATA in images:
            raise ValueError(
                f"--data = {agnews.DATA}: {self.table} has {', '.join(DATA)}; texts are "
                f"{agnews.OURS}'s"
            )
        return [Alpha(data, alpha) for data, alpha in product(images, self.alpha or (0.1,))]

    @property
    def chosen_seeds(self) -> Sequence[int]:
        return self.seeds or ((1, 2, 3) if self.full else (1,))

    def rounds_of(self, case: Case) -> int:
        """How many rounds its runs have."""
        return self.rounds or case.at(self.scale).rounds

    @property
    def out(self) -> Path:
        return expanded(self.output or Path("runs") / f"reproduce-{self.scale}").resolve()

    @property
    def folder(self) -> Path:
        return self.out / self.table
