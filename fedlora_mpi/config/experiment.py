"""A whole experiment as frozen dataclasses; ``building.py`` builds them from the keys of a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..aggregation.topology import Topology
from ..algorithm import Algorithm, LocalTraining
from ..core.bounds import bounded
from ..core.losses import CROSS_ENTROPY
from ..core.paths import check_path
from ..data.partition import Partition
from ..data.source import Source
from ..data.tasks import Tasks
from ..engine.metrics import MetricName
from ..engine.settings import Engine
from ..models import zoo
from ..models.quantized import Quantization
from ..privacy.check import check_settings
from ..privacy.settings import Privacy
from .blocks import NO_KEY


@dataclass(frozen=True)
class DataBlock:
    """The ``data`` block: the pooled examples, which client gets which of them, and when."""

    source: Source
    partition: Partition
    tasks: Tasks | None = None  # None: all classes from the start

    def __post_init__(self) -> None:
        if self.tasks and self.source.shift == "labels":
            raise ValueError(
                "shift = labels: would make a task other classes for every client; choose none or "
                "rotate"
            )


@dataclass(frozen=True)
class Network:
    """The arguments of ``models.zoo.build``.

    For the package's own models every option is present.
    """

    name: str
    options: Mapping[str, Any]
    weights: str | None = None  # None: initial weights drawn from the seed
    adapter: str | None = None  # a folder of peft; None: low-rank parts start at zero
    head: str | None = None  # the module that is the head; None: found by a forward pass
    output: str | int | None = None  # the field of the logits; None: the output or its clear field
    # the type in which parameters are stored and passes compute; None: that of the network, float32
    dtype: Literal["bfloat16"] | None = None
    # how the weights of Linears are stored, which are then frozen; None: as the other parameters
    quantization: Quantization | None = None

    @property
    def origins(self) -> list[zoo.Origin]:
        """The files that the network is made from."""
        return zoo.find_origins(self.name, self.options, self.weights, self.adapter)


@dataclass(frozen=True)
class ModelBlock:
    """The ``model`` block: one network, or a ``mix`` of them over the clients.

    Client k has network k mod len(mix). With ``clients`` the first clients[0] clients have the
    first network, the next clients[1] the second, and so on. With ``each`` client k has network
    number each[k], counted from 0.

    loss: a name in ``core.losses.LOSSES``, or module:function.
    """

    mix: tuple[Network, ...]
    clients: tuple[int, ...] | None = None
    each: tuple[int, ...] | None = None
    loss: str = CROSS_ENTROPY.name

    def __post_init__(self) -> None:
        if not self.mix:
            raise ValueError("mix = []: must name at least one network")
        if self.clients is not None and self.each is not None:
            raise ValueError(f"each = {list(self.each)}: give either clients or each")
        if self.clients is not None and (
            len(self.clients) != len(self.mix) or min(self.clients) < 1
        ):
            raise ValueError(
                f"clients = {list(self.clients)}: must be {len(self.mix)} integers of at least 1"
            )
        if self.each is not None and not all(0 <= number < len(self.mix) for number in self.each):
            raise ValueError(
                f"each = {list(self.each)}: each item must be from 0 to {len(self.mix) - 1}"
            )

    def network_of_clients(self, clients: int) -> tuple[int, ...]:
        """The index in ``mix`` of each client's network, [N].

        Raises ValueError if ``clients`` or ``each`` is for another number of clients.
        """
        field, count_given = (
            ("each", clients) if self.clients is None else ("clients", sum(self.clients))
        )
        if self.each is not None:
            count_given = len(self.each)
        if count_given != clients:
            raise ValueError(
                f"{field} = {list(getattr(self, field))}: is for {count_given} clients, "
                f"data.partition.clients is {clients}; make the two agree"
            )
        if self.clients is not None:
            return tuple(number for number, count in enumerate(self.clients) for _ in range(count))
        return (
            tuple(client % len(self.mix) for client in range(clients))
            if self.each is None
            else self.each
        )


@dataclass(frozen=True)
class Evaluate:
    """The ``evaluate`` block. every: rounds from one evaluation to the next.

    clients: which clients are evaluated. With ``cohort`` these are the clients of the round, and
    the others have no accuracy in it. The cost of a round then does not depend on the number of
    clients.

    metrics: further scores of each client.
    """

    every: int = 1
    clients: Literal["all", "cohort"] = "all"
    metrics: tuple[MetricName, ...] = ()

    def __post_init__(self) -> None:
        bounded(self, every="[1, inf)")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics = {list(self.metrics)}: name each once")


@dataclass(frozen=True)
class Checkpoint:
    """The ``checkpoint`` block: one in ``every`` rounds; the newest ``keep`` are kept."""

    every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        bounded(self, every="[1, inf)", keep="[1, inf)")


@dataclass(frozen=True)
class Faults:
    """The ``faults`` block: the reaction to dead workers, hangs and non-finite numbers.

    timeout: seconds without progress by a batch after which a rank ends the run; 0: no limit.
    """

    tolerate: bool = False
    timeout: float = 600.0
    non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        bounded(self, timeout="[0, inf)")


@dataclass(frozen=True)
class Log:
    """The ``log`` block: the files that are written in addition to ``log.h5``."""

    csv: bool = False  # RUN/rounds.csv
    tensorboard: bool = False  # RUN/tensorboard/


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment.

    participation: fraction of the clients per round; output: the run folder, in which ``read`` has
    replaced {name} (stem of the file), {algorithm}, {seed} and every dotted key.
    """

    seed: int = 1
    rounds: int = 300
    participation: float = 1.0
    output: str = "runs/{name}"
    data: DataBlock
    model: ModelBlock
    algorithm: Algorithm
    train: LocalTraining = LocalTraining()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    log: Log = Log()
    privacy: Privacy = Privacy()
    topology: Topology | None = None  # None: clients exchange with a server
    reduce: Literal["exact", "fast"] = "exact"
    mix: Literal["auto", "root", "spread"] = "auto"
    uplink: Literal["auto", "sum", "gather"] = "auto"
    server_hosts_clients: bool = False
    # no key: what overrides have reset, a line each
    resets: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata=NO_KEY)

    def __post_init__(self) -> None:
        bounded(self, seed="[0, inf)", rounds="[1, inf)", participation="(0, 1]")
        try:
            self.model.network_of_clients(self.data.partition.clients)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        check_settings(
            self.privacy, self.participation, self.reduce, self.uplink, bool(self.data.tasks)
        )
        if not self.output.strip() or not self.output.isprintable():
            raise ValueError(f"output = {self.output!r}: must be the name of a folder")
        check_path("output", self.output)

    @property
    def cohort(self) -> int:
        """The approximate number of clients per round, at least 1."""
        return max(1, round(self.participation * self.data.partition.clients))
