"""Measure unit costs on this machine: one stack of each client type runs a few batches of a round
on throw-away copies.
"""

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..aggregation.client_mix import PackedMix
from ..aggregation.exact_sum import SUM_TYPES
from ..aggregation.neighbour_mix import NeighbourMixing
from ..aggregation.svd import right_vectors
from ..algorithm import Aggregate, Reports, Term, Upload, Variables
from ..core.paths import expand_home
from ..core.tree import Tree, tmap
from ..engine.speed import TruncatedFeed
from ..engine.train import ClientResult, Trainer
from ..experiment.assembly import Assembly
from ..federation.client_store import ClientStore
from ..federation.clients import Clients
from ..federation.federation import Federation, State
from ..federation.round import run_round
from ..mpi.comm import Solo
from ..store import checkpoint
from ..store.log import Log
from .counted import count_gpu_costs
from .devices import Device
from .forecast import Costs, UnitCosts
from .line import CostLine, sample_limits

# approximate seconds of the trial of a client type; it always takes two rounds of each size
_SECONDS = 4.0
# entries of a round's row that are not columns of the log
_LIST_COLUMNS = ("stop", "skipped", "nan_clients", "undefined_metrics", "seconds_ranks")
_MAX_REPEATS = 5  # largest number of rounds of each size, reached if rounds are short


def measure_costs(
    assembly: Assembly, gpu: Device | None = None, busy_processes: int = 0
) -> tuple[Costs, float]:
    """Return the unit costs of a run on this machine, and the bytes of GPU memory per client.

    With ``gpu``, operations of training are counted, and rounds without it are measured; without
    ``gpu`` the bytes are 0. Training is measured while ``busy_processes`` other processes train
    here.
    """
    federation, client_bytes = assembly.federation, 0.0
    clients = federation.cohorts.clients(0)
    trials = {
        number: _Trial(assembly, number, trains=gpu is None) for number in range(len(clients.types))
    }
    units = {number: trial.measure_unit(busy_processes) for number, trial in trials.items()}
    if gpu:
        for number, trial in trials.items():
            settings, precision = assembly.config.train, assembly.config.engine.precision
            gpu_costs = count_gpu_costs(
                clients.types[number], trial.client, settings.batch_size, gpu, precision
            )
            units[number] = UnitCosts(
                gpu_costs.train, gpu_costs.tune, gpu_costs.score, units[number].add
            )
            client_bytes = max(client_bytes, gpu_costs.client_bytes)
    begin, close = (
        max(getattr(trial, name) for trial in trials.values()) for name in ("begin", "close")
    )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first_trial = next(iter(trials.values()))
    mix, trial_mix_seconds = first_trial.measure_mix()
    matrices = _decomposed_matrices(federation)
    vectors = _median_seconds(lambda: right_vectors(Solo(), matrices)) if matrices else 0.0
    ones = np.ones(min(max(federation.aggregator.terms.size, 2**16), 2**21), np.int64)
    add_byte = _median_seconds(lambda: np.add(ones, ones)) / ones.nbytes
    close = max(0.0, close - trial_mix_seconds - vectors)
    return Costs(
        units,
        begin,
        close,
        vectors,
        mix,
        *_measure_files(assembly, *first_trial.row),
        add_byte,
        resident,
    ), client_bytes


def untrained_aggregate(federation: Federation) -> Aggregate:
    """What the server would receive in round 0 if all of a cohort, clients of equal weight, came
    back untrained.
    """
    cohort = federation.cohorts.sample(0)
    clients = federation.clients
    terms = [clients[client].untrained_term for client in cohort.members or (0,)]

    def total(*leaves: Tensor) -> Tensor:
        return cast(Tensor, sum(leaves))

    def times_weights(term: Term) -> Tree:
        return {n: v * term.weights.get(n, 1) for n, v in term.mean.items()}

    weights = tmap(total, *(term.weights for term in terms))
    means = tmap(total, *map(times_weights, terms))
    mean = {n: v / weights.get(n, len(terms)) for n, v in means.items()}
    return Aggregate(
        mean,
        tmap(total, *(term.sum for term in terms)),
        {n: v / len(terms) for n, v in tmap(total, *(term.metrics for term in terms)).items()},
        round=0,
        clients=len(terms),
        share=len(terms) / len(clients),
        weight=len(terms),
        reports=Reports.of({c: clients[c].untrained_upload for c in cohort.members or (0,)}),
    )


def _decomposed_matrices(federation: Federation) -> dict[str, tuple[Tensor, int]]:
    """The matrices that the server decomposes in a round."""
    decomposed: dict[str, tuple[Tensor, int]] = {}

    def svd(matrices: dict[str, tuple[Tensor, int]]) -> Tree:
        decomposed.update(matrices)
        return right_vectors(Solo(), matrices)

    shared = federation.clients.types[0].initial.shared
    server = federation.algorithm.server(federation.clients.trainer.model, shared)
    federation.algorithm.server_update(server, shared, untrained_aggregate(federation), svd)
    return decomposed


class _Untrained(Trainer):
    """Returns what it receives and tests nothing: a round costs what it costs beside training."""

    @classmethod
    def of(cls, trainer: Trainer) -> "_Untrained":
        return cls(**{field.name: getattr(trainer, field.name) for field in fields(trainer)})

    def train(
        self,
        clients: Sequence[int],
        shared: Tree,
        personal_C: Tree,
        round_: int,
        evaluate: bool = False,
    ) -> Iterator[ClientResult]:
        received = self.transport.download(shared)
        scores = self.score_clients(clients, shared, personal_C)
        for row, client in enumerate(clients):
            v = Variables(received, {n: rows[row] for n, rows in personal_C.items()})
            score = scores[row] if evaluate else None
            yield ClientResult(client, v, v, torch.zeros(()), score, v.personal)

    def score_clients(
        self, clients: Sequence[int], shared: Tree, personal_C: Tree, round_: int = 0
    ) -> Tensor:
        return torch.zeros(len(clients), 3 + len(self.metrics), dtype=torch.float64)


class _Trial:
    """Rounds of one stack of a type of client; their durations by number of samples used."""

    def __init__(self, assembly: Assembly, number: int, trains: bool) -> None:
        self._config, self._federation = assembly.config, assembly.federation
        self._clients, self._number = self._federation.cohorts.clients(0), number
        self._trains = trains  # else rounds without training are measured
        self._type = self._clients.types[number]
        if not trains:
            self._type = replace(self._type, trainer=_Untrained.of(self._type.trainer))
        placement, sizes = self._federation.placement, self._clients.sizes
        self.group = next(
            g
            for g in placement.groups
            if self._clients.type_of[g[0]] == number and any(sizes[c] for c in g)
        )
        with_data = [c for c in self.group if sizes[c]]
        stack = placement.split_into_stacks(with_data, self._clients)[0]
        use_full_stack = self._type.trainer.stacked and trains
        # a loop costs the same per client, so one client is enough
        self._stack = tuple(stack if use_full_stack else stack[:1])
        self.client = stack[0]
        self._feed = TruncatedFeed(self._type.trainer.feed, 1)
        self._one_stack = self._only_stacks((self._stack,))
        self._stage_seconds: dict[tuple, list[tuple[float, ...]]] = {}

    def measure_unit(self, busy_processes: int) -> UnitCosts:
        """Return the unit costs of the client type, measured while ``busy_processes`` other
        processes train.
        """
        sizes, batch_size = (
            [self._clients.sizes[c] for c in self._stack],
            self._config.train.batch_size,
        )
        sample_sizes = sample_limits(max(sizes), batch_size) if self._trains else (1, 1, 1)
        two_stacks, half_stack = self._two_stacks(), self._half_stack()
        trials = [
            (limit, evaluate, self._one_stack)
            for limit in sorted(set(sample_sizes))
            for evaluate in (False, True)
        ]
        trials += [(sample_sizes[0], False, two_stacks)] if two_stacks else []
        trials += [
            (limit, False, half_stack) for limit in sorted(set(sample_sizes[1:])) if half_stack
        ]
        with _run_beside(
            busy_processes,
            lambda: self._run_round(sample_sizes[1], False, self._one_stack, keep=False),
        ):
            started, rounds = time.perf_counter(), 0
            while rounds < 3 or (
                rounds < _MAX_REPEATS and time.perf_counter() - started < _SECONDS
            ):
                for limit, judged, federation in trials:
                    self._run_round(limit, judged, federation, keep=rounds > 0)
                rounds += 1
                if rounds > 1 and time.perf_counter() - started > 4 * _SECONDS:
                    break
        stack_size, max_samples = len(self._stack), max(sizes)

        def train_seconds(limit):
            return self._median_stage(limit, False, self._one_stack, 0)

        max_samples = max_samples if self._trains else 1
        line = CostLine.through(train_seconds, stack_size, max_samples, batch_size)
        if half_stack:
            line = line.with_client_cost(
                lambda limit: self._median_stage(limit, False, half_stack, 0),
                stack_size // 2,
                stack_size,
                max_samples,
                batch_size,
            )
        self.begin = self._begin_seconds(line, sample_sizes[0], two_stacks)
        self.close = self._median_stage(sample_sizes[0], False, self._one_stack, 1)
        score, tune = self._evaluation_costs(sample_sizes, stack_size, max_samples)
        return UnitCosts(
            line._replace(per_round=max(0.0, line.per_round - self.begin)),
            tune,
            score,
            self._add_seconds(),
        )

    def measure_mix(self) -> tuple[tuple[float, float], float]:
        """Return the seconds of a mix per client and per pair, and the seconds of the mix that the
        measured rounds contain.
        """
        if self._federation.aggregator.mixing is None:
            return (0.0, 0.0), 0.0
        mixing, algorithm = self._federation.aggregator.mixing, self._federation.algorithm
        offer = self._type.untrained_upload.mix
        assert offer is not None  # the method mixes
        packed = mixing.pack(offer)
        clients = sorted(range(len(self._clients.sizes)), key=lambda c: -self._clients.sizes[c])
        client_counts = [n for n in (2, 4, 8) if n <= len(clients)]

        def mix_seconds(n: int) -> float:
            offers = {c: PackedMix(*(part + 1e-3 * c for part in packed)) for c in clients[:n]}
            return _median_seconds(lambda: mixing.mix(Solo(), algorithm, offers, offers, 0))

        if isinstance(mixing, NeighbourMixing):  # each addition of a row takes as long
            trial_clients = frozenset(clients[: client_counts[-1]])
            pair = mix_seconds(len(trial_clients)) / mixing.additions(trial_clients)
            return (0.0, pair), pair * mixing.additions(frozenset(self._stack))
        if len(client_counts) < 2:
            return (mix_seconds(len(clients)) / len(clients), 0.0), 0.0
        low, high = client_counts[0], client_counts[-1]
        a, b = mix_seconds(low) / low, mix_seconds(high) / high  # both are each + pair * n
        pair = max(0.0, (b - a) / (high - low))
        each = max(0.0, b - pair * high)
        c = len(self._stack)
        return (each, pair), each * c + pair * c * c if c > 1 else 0.0

    def _run_round(self, limit: int, evaluate: bool, federation: Federation, keep: bool) -> None:
        """Run one round. If ``keep``, store its seconds of training, exchange and evaluation,
        without the time in which other programs had the core.
        """
        self._feed.limit = limit
        initial = self._type.initial
        clients = [c for group in federation.placement.groups for c in group]
        rows = {
            self._type.prefix + n: v.expand(len(clients), *v.shape).clone()
            for n, v in initial.personal.items()
        }
        device = self._type.trainer.device
        shared = {n: v.to(device) for n, v in initial.shared.items()}
        state = State(0, self._server(shared), shared, rows)
        wall, cpu = time.perf_counter(), time.process_time()
        _, row, clients_N = run_round(federation, state, evaluate, False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        row = {name: value for name, value in row.items() if name not in _LIST_COLUMNS}
        self.row = row, clients_N
        if keep:
            cpu_share = (
                min(1.0, cpu / wall)
                if self._config.engine.threads == 1 and device.type == "cpu"
                else 1.0
            )
            seconds = tuple(
                cpu_share * float(row[f"seconds_{stage}"])
                for stage in ("train", "exchange", "evaluate")
            )
            self._stage_seconds.setdefault((limit, evaluate, id(federation)), []).append(seconds)

    def _median_stage(
        self, limit: int, evaluate: bool, federation: Federation, stage: int
    ) -> float:
        return median(
            seconds[stage] for seconds in self._stage_seconds[limit, evaluate, id(federation)]
        )

    def _begin_seconds(self, line: CostLine, limit: int, two_stacks: Federation | None) -> float:
        """Seconds that a round needs before its first stack. Two stacks need them only once, so
        they are twice the time of one stack minus the time of two.
        """
        if two_stacks is None:
            return 0.0
        one_stack_seconds, two_stack_seconds = (
            self._median_stage(limit, False, federation, 0)
            for federation in (self._one_stack, two_stacks)
        )
        return min(line.per_round, max(0.0, 2 * one_stack_seconds - two_stack_seconds))

    def _two_stacks(self) -> Federation | None:
        """A run of two stacks of equal length; None if there are too few clients."""
        same_kind = [
            c
            for c in range(len(self._clients.sizes))
            if self._clients.type_of[c] == self._number and self._clients.sizes[c]
        ]
        other_clients = [c for c in same_kind if c not in self._stack][: len(self._stack)]
        return (
            self._only_stacks((self._stack, tuple(other_clients)))
            if len(other_clients) == len(self._stack)
            else None
        )

    def _half_stack(self) -> Federation | None:
        """A run of the half of the stack with the larger clients; None if all clients have equally
        many samples.
        """
        ragged = len({self._clients.sizes[c] for c in self._stack}) > 1
        return self._only_stacks((self._stack[: len(self._stack) // 2],)) if ragged else None

    def _evaluation_costs(
        self, sample_sizes: tuple[int, int, int], stack_size: int, max_samples: int
    ) -> tuple[CostLine, CostLine]:
        """Return (cost of test samples, cost of tuning before an evaluation)."""
        feed, batch_size = self._type.trainer.feed, self._config.train.batch_size
        tests = max(1, sum(feed.test_size(c) for c in self._stack))

        def evaluate_seconds(limit):
            return self._median_stage(limit, True, self._one_stack, 2)

        if not self._type.algorithm.personalize(self._type.trainer.model, self._config.train, 0):
            return CostLine(0.0, 0.0, self._score_seconds()), CostLine(0.0, 0.0, 0.0)
        score_seconds = max(
            0.0,
            self._median_stage(sample_sizes[0], True, self._one_stack, 0)
            - self._median_stage(sample_sizes[0], False, self._one_stack, 0),
        )
        line = CostLine.through(evaluate_seconds, stack_size, max_samples, batch_size)
        score_seconds = min(score_seconds, line.per_round)
        return CostLine(0.0, 0.0, score_seconds / tests), line._replace(
            per_round=line.per_round - score_seconds
        )

    def _score_seconds(self) -> float:
        """Seconds of a test sample when as many clients as possible are evaluated at once."""
        client_type, group = self._type, self.group
        members = self._federation.placement.split_into_stacks(
            group, self._clients, client_type.trainer.evaluation_stack_size(group, 0)
        )[0]
        rows = {
            n: v.expand(len(members), *v.shape) for n, v in client_type.initial.personal.items()
        }
        tests = max(1, sum(client_type.trainer.feed.test_size(c) for c in members))
        return (
            _median_seconds(
                lambda: client_type.trainer.evaluate(members, client_type.initial.shared, rows)
            )
            / tests
        )

    def _add_seconds(self) -> float:
        """Seconds to expand, pack and add up one client's upload."""
        aggregator, initial = self._federation.aggregator, self._type.initial
        upload, expand = self._type.untrained_upload, self._type.transport.expand
        travelling = Upload(upload.mean, upload.sum)
        message = SUM_TYPES[aggregator.reduce](aggregator.terms.size)
        return _median_seconds(
            lambda: message.add(aggregator.terms.pack(expand(travelling, initial.shared, 1), 1), 1)
        )

    def _server(self, shared: Tree) -> Tree:
        """The server's own variables before round 1."""
        return self._federation.algorithm.server(self._clients.trainer.model, shared)

    def _only_stacks(self, stacks: tuple[tuple[int, ...], ...]) -> Federation:
        """The federation as if only these clients held data, trained by hardly any step, so that
        nothing diverges.
        """
        federation, stacked_clients = self._federation, {c for stack in stacks for c in stack}

        def zero_others(values):
            return tuple(v if c in stacked_clients else 0 for c, v in enumerate(values))

        small_step_settings = replace(self._config.train, lr=1e-6 * self._config.train.lr)
        trainers = (
            replace(t.trainer, feed=self._feed, settings=small_step_settings)
            for t in self._clients.types
        )
        types = tuple(
            replace(t, trainer=trainer if self._trains else _Untrained.of(trainer))
            for t, trainer in zip(self._clients.types, trainers, strict=True)
        )
        clients = Clients(
            types,
            self._clients.type_of,
            zero_others(self._clients.sizes),
            zero_others(self._clients.weights),
        )
        placement = replace(
            federation.placement,
            groups=stacks,
            costs=(1.0,) * len(stacks),
            rank_of_group=(0,) * len(stacks),
        )
        return replace(
            federation,
            clients=clients,
            cohorts=replace(federation.cohorts, tasks=(clients,), participation=1.0),
            placement=placement,
            store=ClientStore(clients, placement),
        )


@contextmanager
def _run_beside(busy_processes: int, work: Callable[[], object]) -> Iterator[None]:
    """Run ``work`` repeatedly in ``busy_processes`` other processes while the context is open.

    They act like other workers, with which this process shares caches and memory. Linux only.
    """
    parent, children = os.getpid(), []
    try:
        # on other systems a fork is not safe
        for _ in range(busy_processes if sys.platform == "linux" else 0):
            child = os.fork()
            if child:
                children.append(child)
                continue
            try:
                while os.getppid() == parent:
                    work()
            finally:
                os._exit(0)
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _median_seconds(
    work: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> float:
    """The median time of three calls, after one call to warm up."""
    seconds = []
    for _ in range(4):
        started = clock()
        work()
        seconds.append(clock() - started)
    return median(seconds[1:])


def _measure_files(
    assembly: Assembly, row: dict, clients_N: dict
) -> tuple[float, float, float, float]:
    """Return the seconds of a row of the log, of a checkpoint, of each client file in it and of
    each byte, measured on the disk to which the run will write.
    """
    existing_folder = next(
        p for p in expand_home(assembly.config.output).absolute().parents if p.is_dir()
    )
    few_bytes, many_bytes, counter = 2**10, 2**24, iter(range(1, 100))
    initial = assembly.federation.clients[0].initial

    # tiny leaves, because the cost of bytes is measured separately
    def tiny_leaves(tree):
        return {leaf: np.ones((1, 1), np.float32) for leaf in tree}

    with tempfile.TemporaryDirectory(
        dir=existing_folder if os.access(existing_folder, os.W_OK) else None
    ) as name:
        log = Log.create(
            Path(name) / "log.h5",
            clients=len(assembly.split.train),
            config_yaml="",
            config_json="",
            versions={},
            partition={},
        )
        wall_clock = time.perf_counter  # includes waiting for the disk
        append_seconds = _median_seconds(
            lambda: log.append(next(counter), row, clients_N), wall_clock
        )
        log.close()

        def save(files: int) -> None:
            folder = checkpoint.begin(Path(name), next(counter))
            client_files = [
                checkpoint.write_clients(folder, worker, [worker], tiny_leaves(initial.personal))
                for worker in range(files)
            ]
            server_file = checkpoint.write_server(
                folder, round_=0, shared=tiny_leaves(initial.shared), server={}
            )
            log_copy = checkpoint.copy_log(folder, Path(name) / "log.h5")
            checkpoint.commit(
                folder, [*client_files, server_file, log_copy], run_digest="", clients=files
            )
            checkpoint.prune(Path(name), 1)

        one_file_seconds, three_file_seconds = (
            _median_seconds(partial(save, files), wall_clock) for files in (1, 3)
        )
        file_seconds, folder = (
            max(0.0, three_file_seconds - one_file_seconds) / 2,
            checkpoint.begin(Path(name), next(counter)),
        )

        def leaf_of_size(size):
            return {"leaf": np.ones((1, size // 4), np.float32)}

        def write_seconds(size):
            return _median_seconds(
                lambda: checkpoint.write_clients(folder, next(counter), [0], leaf_of_size(size)),
                wall_clock,
            )

        byte_seconds = max(0.0, write_seconds(many_bytes) - write_seconds(few_bytes)) / (
            many_bytes - few_bytes
        )
    return append_seconds, max(0.0, one_file_seconds - file_seconds), file_seconds, byte_seconds
