"""Measure unit costs on this machine: one stack of each client type runs a few batches of a round
on throw-away copies.
"""

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from ..aggregation.client_mix import PackedMix
from ..aggregation.exact_sum import SUM_TYPES
from ..aggregation.svd import right_vectors
from ..core.paths import expand_home
from ..engine.speed import TruncatedFeed
from ..federation.federation import Run, State
from ..federation.round import run_round
from ..mpi.comm import Solo
from ..run.assembly import Assembly
from ..store import checkpoint
from ..store.log import Log
from .counted import count_gpu_costs
from .devices import Device
from .forecast import Costs, UnitCosts
from .line import CostLine, sample_limits

# approximate seconds of the trial of a client type; it always takes two rounds of each size
_SECONDS = 4.0
# entries of a round's row that are not columns of the log
_LIST_COLUMNS = ("stop", "skipped", "nan_clients", "seconds_ranks")
_MAX_REPEATS = 5  # largest number of rounds of each size, reached if rounds are short


def measure_costs(
    assembly: Assembly, gpu: Device | None = None, busy_processes: int = 0
) -> tuple[Costs, float]:
    """Return the unit costs of a run on this machine, and the bytes of GPU memory per client.

    With ``gpu``, operations are counted, not measured; without it the bytes are 0. Training is
    measured while ``busy_processes`` other processes train here.
    """
    run, client_bytes = assembly.run.for_round(0), 0.0
    trials = {
        kind: _Trial(assembly, run, kind, is_tiny=gpu is not None)
        for kind in sorted(set(run.kind_of))
    }
    units = {kind: trial.measure_unit(busy_processes) for kind, trial in trials.items()}
    if gpu:
        for kind, trial in trials.items():
            settings, precision = assembly.config.train, assembly.config.engine.precision
            gpu_costs = count_gpu_costs(
                run.kinds[kind], trial.client, settings.batch_size, gpu, precision
            )
            units[kind] = UnitCosts(
                gpu_costs.train, gpu_costs.tune, gpu_costs.score, units[kind].add
            )
            client_bytes = max(client_bytes, gpu_costs.client_bytes)
    begin, close = (
        max(getattr(trial, name) for trial in trials.values()) for name in ("begin", "close")
    )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first_trial = next(iter(trials.values()))
    mix, trial_mix_seconds = first_trial.measure_mix()
    matrices = run.algorithm.decomposed(run.kinds[0].initial.shared)
    vectors = _median_seconds(lambda: right_vectors(Solo(), matrices)) if matrices else 0.0
    ones = np.ones(min(max(run.upload_layout.size, 2**16), 2**21), np.int64)
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


class _Trial:
    """Measured rounds of one stack of a client type; keeps their times by the number of samples
    used.
    """

    def __init__(self, assembly: Assembly, run: Run, kind_number: int, is_tiny: bool) -> None:
        self._config, self._run, self._kind, self._kind_number = (
            assembly.config,
            run,
            run.kinds[kind_number],
            kind_number,
        )
        self.group = next(
            g
            for g in run.groups
            if run.kind_of[g[0]] == kind_number and any(run.sizes[c] for c in g)
        )
        stack = run.split_into_stacks([c for c in self.group if run.sizes[c]])[0]
        use_full_stack = self._kind.trainer.stacked and not is_tiny
        # a loop costs the same per client, so one client is enough
        self._stack = tuple(stack if use_full_stack else stack[:1])
        self.client, self._is_tiny = stack[0], is_tiny  # tiny: one sample per client is enough
        self._feed = TruncatedFeed(self._kind.trainer.feed, 1)
        self._one_stack_run = self._run_of_stacks((self._stack,))
        self._stage_seconds: dict[tuple, list[tuple[float, ...]]] = {}

    def measure_unit(self, busy_processes: int) -> UnitCosts:
        """Return the unit costs of the client type, measured while ``busy_processes`` other
        processes train.
        """
        sizes, batch_size = [self._run.sizes[c] for c in self._stack], self._config.train.batch_size
        sample_sizes = (1, 1, 1) if self._is_tiny else sample_limits(max(sizes), batch_size)
        two_stack_run, half_stack_run = self._two_stack_run(), self._half_stack_run()
        trials = [
            (limit, evaluate, self._one_stack_run)
            for limit in sorted(set(sample_sizes))
            for evaluate in (False, True)
        ]
        trials += [(sample_sizes[0], False, two_stack_run)] if two_stack_run else []
        trials += [
            (limit, False, half_stack_run)
            for limit in sorted(set(sample_sizes[1:]))
            if half_stack_run
        ]
        with _run_beside(
            busy_processes,
            lambda: self._run_round(sample_sizes[1], False, self._one_stack_run, keep=False),
        ):
            started, rounds = time.perf_counter(), 0
            while rounds < 3 or (
                rounds < _MAX_REPEATS and time.perf_counter() - started < _SECONDS
            ):
                for limit, judged, run in trials:
                    self._run_round(limit, judged, run, keep=rounds > 0)
                rounds += 1
                if rounds > 1 and time.perf_counter() - started > 4 * _SECONDS:
                    break
        stack_size, max_samples = len(self._stack), max(sizes)

        def train_seconds(limit):
            return self._median_stage(limit, False, self._one_stack_run, 0)

        max_samples = 1 if self._is_tiny else max_samples
        line = CostLine.through(train_seconds, stack_size, max_samples, batch_size)
        if half_stack_run:
            line = line.with_client_cost(
                lambda limit: self._median_stage(limit, False, half_stack_run, 0),
                stack_size // 2,
                stack_size,
                max_samples,
                batch_size,
            )
        self.begin = self._begin_seconds(line, sample_sizes[0], two_stack_run)
        self.close = self._median_stage(sample_sizes[0], False, self._one_stack_run, 1)
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
        if self._run.mixing is None:
            return (0.0, 0.0), 0.0
        mixing, algorithm, v = self._run.mixing, self._run.algorithm, self._kind.local_initial
        offer = algorithm.offer(v, v)
        assert offer is not None  # the method mixes
        packed = mixing.pack(offer)
        clients = sorted(range(len(self._run.sizes)), key=lambda c: -self._run.sizes[c])
        client_counts = [n for n in (2, 4, 8) if n <= len(clients)]

        def mix_seconds(n: int) -> float:
            offers = {c: PackedMix(*(part + 1e-3 * c for part in packed)) for c in clients[:n]}
            return _median_seconds(lambda: mixing.mix(Solo(), algorithm, offers, offers, 0))

        if len(client_counts) < 2:
            return (mix_seconds(len(clients)) / len(clients), 0.0), 0.0
        low, high = client_counts[0], client_counts[-1]
        a, b = mix_seconds(low) / low, mix_seconds(high) / high  # both are each + pair * n
        pair = max(0.0, (b - a) / (high - low))
        each = max(0.0, b - pair * high)
        c = len(self._stack)
        return (each, pair), each * c + pair * c * c if c > 1 else 0.0

    def _run_round(self, limit: int, evaluate: bool, run: Run, keep: bool) -> None:
        """Run one round. If ``keep``, store its seconds of training, exchange and evaluation,
        without the time in which other programs had the core.
        """
        self._feed.limit = limit
        initial, clients = self._kind.initial, [c for group in run.groups for c in group]
        rows = {
            self._kind.prefix + n: v.expand(len(clients), *v.shape).clone()
            for n, v in initial.personal.items()
        }
        device = self._kind.trainer.device
        shared = {n: v.to(device) for n, v in initial.shared.items()}
        state = State(0, run.algorithm.server(run.trainer.model, shared), shared, rows)
        wall, cpu = time.perf_counter(), time.process_time()
        _, row, clients_N = run_round(run, state, evaluate, False)
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
            self._stage_seconds.setdefault((limit, evaluate, id(run)), []).append(seconds)

    def _median_stage(self, limit: int, evaluate: bool, run: Run, stage: int) -> float:
        return median(seconds[stage] for seconds in self._stage_seconds[limit, evaluate, id(run)])

    def _begin_seconds(self, line: CostLine, limit: int, two_stack_run: Run | None) -> float:
        """Seconds that a round needs before its first stack. Two stacks need them only once, so
        they are twice the time of one stack minus the time of two.
        """
        if two_stack_run is None:
            return 0.0
        one_stack_seconds, two_stack_seconds = (
            self._median_stage(limit, False, run, 0) for run in (self._one_stack_run, two_stack_run)
        )
        return min(line.per_round, max(0.0, 2 * one_stack_seconds - two_stack_seconds))

    def _two_stack_run(self) -> Run | None:
        """A run of two stacks of equal length; None if there are too few clients."""
        same_kind = [
            c
            for c in range(len(self._run.sizes))
            if self._run.kind_of[c] == self._kind_number and self._run.sizes[c]
        ]
        other_clients = [c for c in same_kind if c not in self._stack][: len(self._stack)]
        return (
            self._run_of_stacks((self._stack, tuple(other_clients)))
            if len(other_clients) == len(self._stack)
            else None
        )

    def _half_stack_run(self) -> Run | None:
        """A run of the half of the stack with the larger clients; None if all clients have equally
        many samples.
        """
        ragged = len({self._run.sizes[c] for c in self._stack}) > 1
        return self._run_of_stacks((self._stack[: len(self._stack) // 2],)) if ragged else None

    def _evaluation_costs(
        self, sample_sizes: tuple[int, int, int], stack_size: int, max_samples: int
    ) -> tuple[CostLine, CostLine]:
        """Return (cost of test samples, cost of tuning before an evaluation)."""
        feed, batch_size = self._kind.trainer.feed, self._config.train.batch_size
        tests = max(1, sum(feed.test_size(c) for c in self._stack))

        def evaluate_seconds(limit):
            return self._median_stage(limit, True, self._one_stack_run, 2)

        if not self._kind.algorithm.personalize(self._kind.trainer.model, self._config.train, 0):
            return CostLine(0.0, 0.0, self._score_seconds()), CostLine(0.0, 0.0, 0.0)
        score_seconds = max(
            0.0,
            self._median_stage(sample_sizes[0], True, self._one_stack_run, 0)
            - self._median_stage(sample_sizes[0], False, self._one_stack_run, 0),
        )
        line = CostLine.through(evaluate_seconds, stack_size, max_samples, batch_size)
        score_seconds = min(score_seconds, line.per_round)
        return CostLine(0.0, 0.0, score_seconds / tests), line._replace(
            per_round=line.per_round - score_seconds
        )

    def _score_seconds(self) -> float:
        """Seconds of a test sample when as many clients as possible are evaluated at once."""
        kind, group = self._kind, self.group
        members = self._run.split_into_stacks(group, kind.trainer.evaluation_stack_size(group, 0))[
            0
        ]
        rows = {n: v.expand(len(members), *v.shape) for n, v in kind.initial.personal.items()}
        tests = max(1, sum(kind.trainer.feed.test_size(c) for c in members))
        return (
            _median_seconds(lambda: kind.trainer.evaluate(members, kind.initial.shared, rows))
            / tests
        )

    def _add_seconds(self) -> float:
        """Seconds to expand, pack and add up one client's upload."""
        run, kind = self._run, self._kind
        upload, message = kind.untrained_upload, SUM_TYPES[run.reduce](run.upload_layout.size)
        return _median_seconds(
            lambda: message.add(
                run.upload_layout.pack(kind.algorithm.expand(upload, kind.initial.shared, 1)), 1
            )
        )

    def _run_of_stacks(self, stacks: tuple[tuple[int, ...], ...]) -> Run:
        """The run with data only on the clients of ``stacks``. The learning rate is multiplied by
        1e-6, so nothing diverges.
        """
        run, stacked_clients = self._run, {c for stack in stacks for c in stack}

        def zero_others(values):
            return tuple(v if c in stacked_clients else 0 for c, v in enumerate(values))

        small_step_settings = replace(self._config.train, lr=1e-6 * self._config.train.lr)
        kinds = tuple(
            k._replace(trainer=replace(k.trainer, feed=self._feed, settings=small_step_settings))
            for k in run.kinds
        )
        return replace(
            run,
            kinds=kinds,
            sizes=zero_others(run.sizes),
            weight_N=zero_others(run.weight_N),
            participation=1.0,
            groups=stacks,
            costs=(1.0,) * len(stacks),
            rank_of_group=(0,) * len(stacks),
            task_runs=(),
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
    few_bytes, many_bytes, counter, run = 2**10, 2**24, iter(range(1, 100)), assembly.run
    initial = run.kinds[run.kind_of[0]].initial

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
