"""Read a run folder for analysis: metrics as tables and arrays, and the model of every client.

The run may still be going. Only weights and models import torch, and only tables import pandas.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..core.extras import extra_imports
from ..core.names import stored_names
from ..core.paths import expand_home
from ..data.partition import Split
from ..store import schema
from ..store.reader import RunFiles
from ..store.snapshot import Checkpoint

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

    from ..algorithm import Algorithm, Transport, Variables
    from ..config import Config
    from ..config.experiment import Network
    from ..data.feed import Feed
    from ..data.samples import Samples
    from ..data.texts import Vocabulary
    from ..models.network import Model

T = TypeVar("T")


def open_run(path: str | Path) -> "RunView":
    """Return the run in the folder ``path``. Raises ValueError if it is no run folder.

    >>> import fedlora_mpi
    >>> run = fedlora_mpi.open_run("runs/tiny-1")  # FedLoRA, 5 clients, 3 rounds; 2, 3 evaluated
    >>> run.rounds[["train_loss", "accuracy"]].shape  # pandas
    (3, 2)
    >>> run.clients.groupby("round")["accuracy"].count().to_dict()  # of each client's own model
    {2: 5, 3: 5}
    >>> run.array("clients/accuracy").shape, run.axes("clients/accuracy")  # numpy, NaN in round 1
    ((3, 5), ('round', 'client'))
    >>> run.ranks.columns[2:4].tolist()  # seconds of each round and rank
    ['seconds_train', 'seconds_exchange']
    >>> run.partition.train_counts.shape  # samples of each client and class
    (5, 3)
    >>> client = run.client(3)
    >>> client.personal["0.weight.A"].shape  # its low-rank factor, a personal leaf
    (4, 6)
    >>> import torch
    >>> client.model(torch.zeros(4, 2, 8, 8)).shape  # its own model, an nn.Module
    torch.Size([4, 3])
    >>> x, y = client.test_data()  # as the model reads them, normalised
    >>> accuracy = float((client.model(x).argmax(1) == y).float().mean())
    >>> accuracy == float(run.array("clients/accuracy")[-1, 3])  # exactly what the run logged
    True
    >>> sorted(client.model.state_dict()) == sorted(client.weights)  # the same as numpy arrays
    True

    For texts: ``run.client(7).model(run.vocabulary.encode(["a text", "another"]))``.
    """
    return RunView(expand_home(path))


def client_table(
    rounds: Mapping[str, np.ndarray], clients: Mapping[str, np.ndarray]
) -> "DataFrame":
    """Return the table ``RunView.clients`` from columns [T] of the rounds and [T, N] of clients."""
    pandas = import_pandas()
    count = next(iter(clients.values()), np.empty((0, 0))).shape[1]
    index = pandas.MultiIndex.from_product(
        [rounds["round"], range(count)], names=["round", "client"]
    )
    table = pandas.DataFrame({name: column.ravel() for name, column in clients.items()}, index)
    return table.dropna(how="all").reset_index()


class RunView:
    """One run.

    Each access reads the metrics anew. Leaves are those of the newest valid checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path.absolute()  # the working folder may change
        self._files = RunFiles(self._folder)
        # The check reads every byte of a checkpoint, so its result is kept for all clients.
        self._newest_checkpoint = lru_cache(1)(lambda committed: self._files.checkpoint())
        # one entry for each kind of clients
        self._initial_variables = lru_cache(None)(self._make_initial_variables)
        self._feed = lru_cache(1)(self._load_feed)  # one data set for all clients

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config. Some keys are there only if they differ from their defaults."""
        return self._files.config

    @property
    def rounds(self) -> "DataFrame":
        """One row per round, indexed by round.

        Columns: train_loss, accuracy (fraction), seconds_*, bytes_* ... Metrics of the clients' own
        models, such as those of evaluate.metrics, are NaN in rounds without evaluation.
        """
        return import_pandas().DataFrame(self._files.rounds()).set_index("round")

    @property
    def clients(self) -> "DataFrame":
        """One row for each evaluated round and client: round, client, accuracy (fraction), loss
        and evaluate.metrics.
        """
        rows = self._files.columns()
        return client_table(rows["rounds"], rows["clients"])

    @property
    def ranks(self) -> "DataFrame":
        """One row for each evaluated round and rank: round, rank and seconds_* by stage.

        The seconds count from the evaluated round before. seconds_waiting is the time in messages,
        waiting for other ranks; the other stages do not include it. All stages together are the
        whole time that passed. The table is empty for older runs, which did not measure it.
        """
        pandas = import_pandas()
        rows = self._files.columns()
        columns, rounds = rows["ranks"], rows["rounds"]["round"]
        numbers = columns.pop("ranks", np.zeros(0, int))
        seconds = {
            name: [column[row, :n] for row, n in enumerate(numbers)]
            for name, column in columns.items()
        }
        columns_of_table = {
            "round": np.repeat(rounds[: len(numbers)], numbers),
            "rank": [r for n in numbers for r in range(n)],
        }
        return pandas.DataFrame(
            columns_of_table | {name: np.concatenate(rows) for name, rows in seconds.items()}
        )

    def array(self, name: str) -> np.ndarray:
        """Return a column of the log as an array.

        Examples: ``accuracy`` [T] of the rounds, ``clients/accuracy`` [T, N],
        ``ranks/seconds_train`` [T, R]. Raises ValueError if there is no such column.
        """
        rows = self._files.columns()
        columns = rows["rounds"]
        for group in ("clients", "ranks"):
            columns |= {f"{group}/{name}": column for name, column in rows[group].items()}
        if name not in columns:
            raise ValueError(
                f"{self.path}: there is no column {name!r}; there are {', '.join(columns)}"
            )
        return columns[name]

    def axes(self, name: str) -> tuple[str, ...]:
        """Return the names of the axes of ``array(name)``.

        They are ("round",), ("round", "client") or ("round", "rank").
        """
        return self._files.axis_names(name if "/" in name else f"rounds/{name}")

    @cached_property
    def partition(self) -> Split:
        """The samples of each client."""
        stored = self._files.partition()
        with schema.explain_read_errors(self.path / "log.h5"):
            return Split(
                tuple(stored["train"]),
                tuple(stored["test"]),
                stored["train_counts"],
                stored["test_counts"],
            )

    @property
    def checkpoints(self) -> list[int]:
        """The rounds that have a committed checkpoint, ascending."""
        return self._files.checkpoints()

    @property
    def checkpoint(self) -> Checkpoint:
        """The newest valid checkpoint. Raises StoreError (a ValueError) if there is none."""
        return self._newest_checkpoint(tuple(self.checkpoints))

    @property
    def shared(self) -> Mapping[str, np.ndarray]:
        """The shared leaves of the newest checkpoint."""
        return self.checkpoint.shared()

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of the ``shared`` and of the ``personal`` leaves.

        It is equal for runs whose leaves are bit-identical.
        """
        return self.checkpoint.digest()

    @cached_property
    def network_of(self) -> tuple[int, ...]:
        """[N] The number of each client's network in ``model.mix``; 0 if there is only one."""
        return self._parsed_config.model.network_of_clients(len(self.partition.train))

    def client(self, id: int) -> "ClientView":
        """Return one client by its number, from 0. Raises ValueError for any other number."""
        clients = len(self.partition.train)
        if not 0 <= id < clients:
            raise ValueError(f"{self.path}: there is no client {id}; there are 0 to {clients - 1}")
        return ClientView(self, id)

    @cached_property
    def transports(self) -> "tuple[Transport, ...]":
        """What differs between clients, such as a rank of their own, for each client, [N]."""
        clients, algorithm = len(self.partition.train), self._method
        return tuple(algorithm.transport(client, clients) for client in range(clients))

    @cached_property
    def _method(self) -> "Algorithm":
        """The algorithm as the run has it."""
        from .. import config as configs
        from .leaves import with_numbers

        return configs.method_for(self._parsed_config, with_numbers(self.networks[0]))

    @cached_property
    def networks(self) -> "tuple[Model, ...]":
        """The networks of ``model.mix`` with their initial weights, built from the config.

        They need no data set. If the files named by ``model.weights`` or ``model.folder`` are gone,
        the initial weights are on the device "meta": they have shapes but no numbers. A change of
        these files is not noticed.
        """
        from ..config.blocks import prefix_errors

        with prefix_errors(str(self._folder / "config.yaml"), "model"):
            return tuple(
                self._network(*numbered) for numbered in enumerate(self._parsed_config.model.mix)
            )

    def _network(self, number: int, block: "Network") -> "Model":
        from ..core.losses import LOSSES
        from ..models.zoo import build

        stored, config = self._files.partition(), self._parsed_config
        shape = tuple(stored["input_shape"].tolist())
        text_inputs = [int(stored.get(name, [0])[0]) for name in ("input_tokens", "input_padding")]
        outputs: Any = int(stored.get("outputs", self.partition.train_counts.shape[1:])[0])
        inputs = (outputs, shape, config.seed, *text_inputs)
        loss = LOSSES.get(config.model.loss)
        settings: dict[str, Any] = {
            "head": block.head,
            "output": block.output,
            "positions": shape[0] if loss and loss.targets == "tokens" else 0,
            "dtype": block.dtype,
            "quantization": block.quantization,
        }
        if all(file.is_file() for origin in block.origins for file in origin.files):
            settings |= {"weights": block.weights, "adapter": block.adapter}
            return build(block.name, block.options, *inputs, **settings)
        saved_config = self._folder / f"network-{number}.json"
        if saved_config.is_file():
            self._files.read_text(saved_config.name)  # raises if it is damaged
        options = (
            {**block.options, "folder": str(saved_config)}
            if saved_config.is_file()
            else block.options
        )
        model = build(block.name, options, *inputs, **settings)
        on_meta = {n: v.to("meta") for n, v in model.all_values.items()}
        constants = {n: on_meta.get(n, v) for n, v in model.constants.items()}
        return replace(model, initial={n: on_meta[n] for n in model.initial}, constants=constants)

    def by_leaf(self, stored: Mapping[str, T], client: int | None = None) -> dict[str, T]:
        """Return the stored leaves under the method's own names for them.

        stored: {name in the file: value}, of the client's personal leaves; without ``client``, of
        the shared leaves.
        """
        network = min(self.network_of) if client is None else self.network_of[client]
        initial = self._initial_variables(
            self._method if client is None else self.transports[client].method,
            network,
        )
        leaf_of = {
            name: n
            for n, name in stored_names(
                initial.shared if client is None else initial.personal
            ).items()
        }
        return {leaf_of.get(name, name): value for name, value in stored.items()}

    def _make_initial_variables(self, algorithm: "Algorithm", network: int) -> "Variables":
        from .leaves import first_variables

        return first_variables(algorithm, self.networks[network], self._parsed_config.seed)

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        """The vocabulary, which turns texts into inputs of the clients' models.

        Raises ValueError if the run has none.
        """
        from ..data.texts import Vocabulary

        path = self._folder / "vocabulary.json"
        if not path.is_file():
            raise ValueError(
                f"{self.path}: has no vocabulary.json, so its data are images or the run is "
                "incomplete"
            )
        return Vocabulary(self._files.read_text(path.name))

    def _load_feed(self, round_: int) -> "Feed":
        from .client_data import load_feed

        return load_feed(self._folder, self._parsed_config, self.partition, round_)

    @cached_property
    def _parsed_config(self) -> "Config":
        from ..config import from_recorded

        return from_recorded(self.config, str(self.path / "log.h5"))


@dataclass(frozen=True, eq=False)
class ClientView:
    """One client of a run.

    All its leaves are from one checkpoint: the newest at the first access. A run that goes on
    removes this checkpoint later; ``run.client(id)`` then gives a new view.
    """

    run: RunView
    id: int

    @property
    def train_indices(self) -> np.ndarray:
        """[n] indices into the data set's training samples."""
        return self.run.partition.train[self.id]

    @property
    def test_indices(self) -> np.ndarray:
        """[m] indices into the data set's test samples."""
        return self.run.partition.test[self.id]

    @property
    def counts(self) -> np.ndarray:
        """[classes] training samples of each class."""
        return self.run.partition.train_counts[self.id]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the leaves. Raises StoreError (a ValueError) if there is none yet."""
        return self.run.checkpoint

    @property
    def personal(self) -> Mapping[str, np.ndarray]:
        """The leaves that never leave the client. An access reads the leaf from the file."""
        return _PersonalLeaves(self.checkpoint, self.id)

    @cached_property
    def network(self) -> "Model":
        """The client's network, with its initial weights."""
        return self.run.networks[self.run.network_of[self.id]]

    @property
    def network_block(self) -> "Network":
        """The block of the config that describes the client's network."""
        return self.run._parsed_config.model.mix[self.run.network_of[self.id]]

    @property
    def algorithm(self) -> "Algorithm":
        """The method of this client."""
        return self.run.transports[self.id].method

    @cached_property
    def variables(self) -> "Variables":
        """The variables of the client's own model, as tensors.

        The shared ones are as the client receives them; for a method that is evaluated on the
        server they are the server's.
        """
        import torch

        from ..algorithm import Variables

        initial = self.network.initial

        # HDF5 has no bfloat16: such leaves are float32 in the file
        def to_initial_dtype(name, v):
            return v.to(initial[name].dtype) if name in initial else v

        def tensors(leaves):
            return {n: to_initial_dtype(n, torch.from_numpy(value)) for n, value in leaves.items()}

        rows = self.run.by_leaf(self.checkpoint.personal([self.id]), self.id)
        shared = tensors(self.run.by_leaf(self.checkpoint.shared()))
        with self._reading_checkpoint, torch.no_grad():
            downloaded = (
                shared
                if self.algorithm.evaluate_on == "server"
                else self.run.transports[self.id].download(shared)
            )
        return Variables(downloaded, tensors({n: _single_row(row) for n, row in rows.items()}))

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter and statistic of the client's own model, which the run evaluated.

        bfloat16 leaves are float32, because numpy has no bfloat16. Raises ValueError if frozen
        weights are only in a file that is gone.
        """
        import torch

        v = self.variables
        for leaf, initial in self.network.all_values.items():
            # a frozen leaf, which no checkpoint has
            if initial.is_meta and not (leaf in v.shared or leaf in v.personal):
                sources = " or ".join(
                    f"model.{origin.key} = {origin.value}" for origin in self.network_block.origins
                )
                raise ValueError(
                    f"{self.run.path}: {leaf} is in {sources} alone, which is gone; put it back"
                )
        with self._reading_checkpoint, torch.no_grad():
            tree = self.network.all_values | self.algorithm.client_model(self.network, v)
        return {n: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for n, v in tree.items()}

    def test_data(self) -> "Samples":
        """Return the client's test samples (x, y), as its ``model`` reads them, on the CPU.

        x [m, ...] is normalised float32, or int64 token ids of texts; y [m] is int64. Both are as
        in the run: ``data.shift`` is applied, and with ``data.tasks`` these are the classes of the
        task of the checkpoint's round. The model's accuracy on them is ``clients/accuracy`` of this
        round, for a method that evaluates the model as it is. (Of ``personalize`` and of
        ``evaluate_on = "after_training"`` the evaluated copies are not kept.)

        Reads the data set of the config. Raises ValueError if it is missing or has changed.
        """
        from .client_data import client_test_samples

        return client_test_samples(self.run._feed(self.checkpoint.round), self.id)

    def train_data(self) -> "Samples":
        """Return the client's training samples (x, y), as ``test_data``, without augmentation."""
        from .client_data import client_train_samples

        return client_train_samples(self.run._feed(self.checkpoint.round), self.id)

    @cached_property
    def model(self) -> "nn.Module":
        """The client's own model, in evaluation mode, on the CPU.

        It reads inputs as ``test_data`` returns them: normalised.
        """
        import torch

        weights = {name: torch.from_numpy(value) for name, value in self.weights.items()}
        with self._reading_checkpoint:
            return self.network.to_module(weights)

    @property
    def _reading_checkpoint(self) -> AbstractContextManager:
        """A context that raises StoreError for leaves that do not fit the network.

        The error says that the checkpoint is damaged.
        """
        return schema.explain_read_errors(self.checkpoint.path)


@dataclass(frozen=True)
class _PersonalLeaves(Mapping):
    """The personal leaves of one client."""

    checkpoint: Checkpoint
    id: int

    def __getitem__(self, leaf: str) -> np.ndarray:
        if leaf not in self.checkpoint.leaf_names([self.id]):
            raise KeyError(f"{leaf}: no personal leaf; there are {', '.join(self) or 'none'}")
        return _single_row(self.checkpoint.personal([self.id], [leaf])[leaf])

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.leaf_names([self.id]))

    def __len__(self) -> int:
        return len(self.checkpoint.leaf_names([self.id]))


def _single_row(rows: np.ndarray) -> np.ndarray:
    """Return the only row of [1, ...], as an array even if the row is a number."""
    return rows.reshape(rows.shape[1:])


def import_pandas():
    """Return the module pandas. Raises ValueError if it is not installed."""
    with extra_imports("pandas", "analysis", "tables", "use array()"):
        import pandas
    return pandas
