"""Unit costs, measured here: a stack of each kind of clients plays a few batches of a round on
throw-away copies.
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

from ..aggregation.client_mix import Packed
from ..aggregation.exact_sum import SUMS
from ..aggregation.svd import right_vectors
from ..core.paths import expanded
from ..engine.speed import Short
from ..federation.federation import Run, State
from ..federation.round import play
from ..mpi.comm import Solo
from ..run.assembly import Built
from ..store import checkpoint
from ..store.log import Log
from .counted import counted
from .devices import Device
from .forecast import Costs, Unit
from .line import Line, limits

_SECONDS = 4.0  # that the trial of a kind may take, about; it always takes two rounds of each size
_LISTS = ("stop", "skipped", "nan_clients", "seconds_ranks")  # of a row, which are no columns
_TIMES = 5  # rounds of each size where they are short


def measured(built: Built, gpu: Device | None = None, others: int = 0) -> tuple[Costs, float]:
    """The unit costs of a run on this machine, one thread as ``engine.threads`` says; clients on a
    ``gpu`` by count. Training is measured while so many ``others`` train here.

    The second number: bytes of that GPU which a client takes.
    """
    run, client = built.run.of_round(0), 0.0
    trials = {
        kind: _Trial(built, run, kind, tiny=gpu is not None) for kind in sorted(set(run.kind_of))
    }
    units = {kind: trial.unit(others) for kind, trial in trials.items()}
    if gpu:
        for kind, trial in trials.items():
            settings, precision = built.config.train, built.config.engine.precision
            found = counted(run.kinds[kind], trial.client, settings.batch_size, gpu, precision)
            units[kind] = Unit(found.train, found.tune, found.score, units[kind].add)
            client = max(client, found.client)
    begin, close = (
        max(getattr(trial, name) for trial in trials.values()) for name in ("begin", "close")
    )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first = next(iter(trials.values()))
    mix, own = first.mix()
    matrices = run.algorithm.decomposed(run.kinds[0].first.shared)
    vectors = _seconds(lambda: right_vectors(Solo(), matrices)) if matrices else 0.0
    ones = np.ones(min(max(run.upload.size, 2**16), 2**21), np.int64)
    add_byte = _seconds(lambda: np.add(ones, ones)) / ones.nbytes
    close = max(0.0, close - own - vectors)
    return Costs(
        units, begin, close, vectors, mix, *_files(built, *first.row), add_byte, resident
    ), client


class _Trial:
    """Rounds of one stack of a kind; what they took by number of samples used."""

    def __init__(self, built: Built, run: Run, number: int, tiny: bool) -> None:
        self._config, self._run, self._kind, self._number = (
            built.config,
            run,
            run.kinds[number],
            number,
        )
        self.group = next(
            g for g in run.groups if run.kind_of[g[0]] == number and any(run.sizes[c] for c in g)
        )
        stack = run.stacks([c for c in self.group if run.sizes[c]])[0]
        whole = self._kind.trainer.stacked and not tiny
        self._stack = tuple(stack if whole else stack[:1])  # a loop's clients are alike
        self.client, self._tiny = stack[0], tiny  # whether a sample will do
        self._feed = Short(self._kind.trainer.feed, 1)
        self._alone = self._holding((self._stack,))
        self._taken: dict[tuple, list[tuple[float, float, float]]] = {}

    def unit(self, others: int) -> Unit:
        """Play beside so many others, and read the unit costs off."""
        sizes, batch_size = [self._run.sizes[c] for c in self._stack], self._config.train.batch_size
        few = (1, 1, 1) if self._tiny else limits(max(sizes), batch_size)
        twice, half = self._twice(), self._half()
        plays = [
            (limit, judged, self._alone) for limit in sorted(set(few)) for judged in (False, True)
        ]
        plays += [(few[0], False, twice)] if twice else []
        plays += [(limit, False, half) for limit in sorted(set(few[1:])) if half]
        with _beside(others, lambda: self._play(few[1], False, self._alone, keep=False)):
            begun, rounds = time.perf_counter(), 0
            while rounds < 3 or (rounds < _TIMES and time.perf_counter() - begun < _SECONDS):
                for limit, judged, run in plays:
                    self._play(limit, judged, run, keep=rounds > 0)
                rounds += 1
                if rounds > 1 and time.perf_counter() - begun > 4 * _SECONDS:
                    break
        count, most = len(self._stack), max(sizes)

        def train(limit):
            return self._median(limit, False, self._alone, 0)

        most = 1 if self._tiny else most
        line = Line.through(train, count, most, batch_size)
        if half:
            line = line.shared(
                lambda limit: self._median(limit, False, half, 0),
                count // 2,
                count,
                most,
                batch_size,
            )
        self.begin = self._begin(line, few[0], twice)
        self.close = self._median(few[0], False, self._alone, 1)
        score, tune = self._judged(few, count, most)
        return Unit(line._replace(once=max(0.0, line.once - self.begin)), tune, score, self._add())

    def mix(self) -> tuple[tuple[float, float], float]:
        """Seconds of a mix for each client and for each pair, and of the mix that the trial's
        rounds had in them.
        """
        if self._run.mixing is None:
            return (0.0, 0.0), 0.0
        mixing, algorithm, v = self._run.mixing, self._run.algorithm, self._kind.arrived
        packed = mixing.pack(algorithm.offer(v, v))
        clients = sorted(range(len(self._run.sizes)), key=lambda c: -self._run.sizes[c])
        some = [n for n in (2, 4, 8) if n <= len(clients)]

        def took(n: int) -> float:
            offers = {c: Packed(*(part + 1e-3 * c for part in packed)) for c in clients[:n]}
            return _seconds(lambda: mixing.mix(Solo(), algorithm, offers, offers, 0))

        if len(some) < 2:
            return (took(len(clients)) / len(clients), 0.0), 0.0
        low, high = some[0], some[-1]
        a, b = took(low) / low, took(high) / high  # each + pair * n
        pair = max(0.0, (b - a) / (high - low))
        each = max(0.0, b - pair * high)
        c = len(self._stack)
        return (each, pair), each * c + pair * c * c if c > 1 else 0.0

    def _play(self, limit: int, judged: bool, run: Run, keep: bool) -> None:
        """One round; its seconds of training, exchange and evaluation, without those that other
        programs had the core.
        """
        self._feed.limit = limit
        first, clients = self._kind.first, [c for group in run.groups for c in group]
        rows = {
            self._kind.prefix + n: v.expand(len(clients), *v.shape).clone()
            for n, v in first.personal.items()
        }
        device = self._kind.trainer.device
        shared = {n: v.to(device) for n, v in first.shared.items()}
        state = State(0, run.algorithm.server(run.trainer.model, shared), shared, rows)
        wall, cpu = time.perf_counter(), time.process_time()
        _, row, clients_N = play(run, state, judged, False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        row = {name: value for name, value in row.items() if name not in _LISTS}
        self.row = row, clients_N
        if keep:
            own = (
                min(1.0, cpu / wall)
                if self._config.engine.threads == 1 and device.type == "cpu"
                else 1.0
            )
            seconds = tuple(
                own * float(row[f"seconds_{stage}"]) for stage in ("train", "exchange", "evaluate")
            )
            self._taken.setdefault((limit, judged, id(run)), []).append(seconds)

    def _median(self, limit: int, judged: bool, run: Run, stage: int) -> float:
        return median(seconds[stage] for seconds in self._taken[limit, judged, id(run)])

    def _begin(self, line: Line, limit: int, twice: Run | None) -> float:
        """What a round has to do before its first stack: what two stacks take less than twice as
        much of.
        """
        if twice is None:
            return 0.0
        one, two = (self._median(limit, False, run, 0) for run in (self._alone, twice))
        return min(line.once, max(0.0, 2 * one - two))

    def _twice(self) -> Run | None:
        """A run of two stacks, where there are clients for them."""
        alike = [
            c
            for c in range(len(self._run.sizes))
            if self._run.kind_of[c] == self._number and self._run.sizes[c]
        ]
        others = [c for c in alike if c not in self._stack][: len(self._stack)]
        return (
            self._holding((self._stack, tuple(others))) if len(others) == len(self._stack) else None
        )

    def _half(self) -> Run | None:
        """A run of the larger half of the stack, where some clients have data for fewer batches
        than others.
        """
        ragged = len({self._run.sizes[c] for c in self._stack}) > 1
        return self._holding((self._stack[: len(self._stack) // 2],)) if ragged else None

    def _judged(self, few: tuple[int, int, int], count: int, most: int) -> tuple[Line, Line]:
        """Seconds of a test sample, and of the tuning before an evaluation."""
        feed, batch_size = self._kind.trainer.feed, self._config.train.batch_size
        tests = max(1, sum(feed.test_size(c) for c in self._stack))

        def evaluation(limit):
            return self._median(limit, True, self._alone, 2)

        if not self._kind.algorithm.tune(self._kind.trainer.model, self._config.train, 0):
            return Line(0.0, 0.0, self._score()), Line(0.0, 0.0, 0.0)
        scored = max(
            0.0,
            self._median(few[0], True, self._alone, 0)
            - self._median(few[0], False, self._alone, 0),
        )
        line = Line.through(evaluation, count, most, batch_size)
        scored = min(scored, line.once)
        return Line(0.0, 0.0, scored / tests), line._replace(once=line.once - scored)

    def _score(self) -> float:
        """Seconds of a test sample, of as many clients as are judged at once."""
        kind, group = self._kind, self.group
        members = self._run.stacks(group, kind.trainer.judged_at_once(group, 0))[0]
        rows = {n: v.expand(len(members), *v.shape) for n, v in kind.first.personal.items()}
        tests = max(1, sum(kind.trainer.feed.test_size(c) for c in members))
        return _seconds(lambda: kind.trainer.evaluate(members, kind.first.shared, rows)) / tests

    def _add(self) -> float:
        """Seconds to expand, pack and add up a client's upload."""
        run, kind = self._run, self._kind
        upload, message = kind.upload, SUMS[run.reduce](run.upload.size)
        return _seconds(
            lambda: message.add(
                run.upload.pack(kind.algorithm.expand(upload, kind.first.shared, 1)), 1
            )
        )

    def _holding(self, stacks: tuple[tuple[int, ...], ...]) -> Run:
        """The run as if only these clients held data, trained by hardly any step, so that nothing
        diverges.
        """
        run, there = self._run, {c for stack in stacks for c in stack}

        def some(values):
            return tuple(v if c in there else 0 for c, v in enumerate(values))

        gentle = replace(self._config.train, lr=1e-6 * self._config.train.lr)
        kinds = tuple(
            k._replace(trainer=replace(k.trainer, feed=self._feed, settings=gentle))
            for k in run.kinds
        )
        one = {
            "groups": stacks,
            "costs": (1.0,) * len(stacks),
            "host": (0,) * len(stacks),
            "by_task": (),
        }
        return replace(
            run,
            kinds=kinds,
            sizes=some(run.sizes),
            weight_N=some(run.weight_N),
            participation=1.0,
            **one,
        )


@contextmanager
def _beside(others: int, work: Callable[[], object]) -> Iterator[None]:
    """Inside it, so many processes do ``work`` again and again, as workers would: cores share
    caches and memory.
    """
    here, children = os.getpid(), []
    try:
        for _ in range(others if sys.platform == "linux" else 0):  # elsewhere a fork is not safe
            child = os.fork()
            if child:
                children.append(child)
                continue
            try:
                while os.getppid() == here:
                    work()
            finally:
                os._exit(0)
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """The median of three, after one that warms up."""
    taken = []
    for _ in range(4):
        begin = clock()
        work()
        taken.append(clock() - begin)
    return median(taken[1:])


def _files(built: Built, row: dict, clients_N: dict) -> tuple[float, float, float, float]:
    """Seconds of a row of the log, of a checkpoint, of each file of clients in it, and of each
    byte, where the run will write.
    """
    home = next(p for p in expanded(built.config.output).absolute().parents if p.is_dir())
    few, many, numbers, run = 2**10, 2**24, iter(range(1, 100)), built.run
    first = run.kinds[run.kind_of[0]].first

    # bytes have their own price
    def small(tree):
        return {leaf: np.ones((1, 1), np.float32) for leaf in tree}

    with tempfile.TemporaryDirectory(dir=home if os.access(home, os.W_OK) else None) as name:
        said, clients = (
            {"config_yaml": "", "config_json": "", "versions": {}, "partition": {}},
            len(built.split.train),
        )
        log = Log.create(Path(name) / "log.h5", clients=clients, **said)
        wait = time.perf_counter  # a disk is waited for
        appended = _seconds(lambda: log.append(next(numbers), row, clients_N), wait)
        log.close()

        def save(files: int) -> None:
            folder = checkpoint.begin(Path(name), next(numbers))
            own = [
                checkpoint.write_clients(folder, worker, [worker], small(first.personal))
                for worker in range(files)
            ]
            ours = checkpoint.write_server(folder, round_=0, shared=small(first.shared), server={})
            copy = checkpoint.copy_log(folder, Path(name) / "log.h5")
            checkpoint.commit(folder, [*own, ours, copy], run_digest="", clients=files)
            checkpoint.prune(Path(name), 1)

        one, three = (_seconds(partial(save, files), wait) for files in (1, 3))
        file, folder = max(0.0, three - one) / 2, checkpoint.begin(Path(name), next(numbers))

        def leaf(size):
            return {"leaf": np.ones((1, size // 4), np.float32)}

        def took(size):
            return _seconds(
                lambda: checkpoint.write_clients(folder, next(numbers), [0], leaf(size)), wait
            )

        byte = max(0.0, took(many) - took(few)) / (many - few)
    return appended, max(0.0, one - file), file, byte
