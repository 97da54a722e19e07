"""What is measured beside the training: time, throughput, floating-point operations."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..core.clock import Stopwatch
from ..engine.flops import UNCOUNTED, Flops
from ..mpi.heartbeat import Heartbeat
from .clients import Clients
from .cohorts import Cohort


class Instruments:
    """The measurements of this rank. They change no result.

    heartbeat: the sign of life that the watchdog reads. seconds: of each stage of the round so far.
    throughput: [2, types] seconds and samples of training, by type of client.
    """

    def __init__(self, clients: Clients, heartbeat: Heartbeat, prints_hint: bool) -> None:
        self.heartbeat = heartbeat
        self.seconds = dict.fromkeys(("train", "exchange", "evaluate"), 0.0)
        self.throughput = np.zeros((2, len(clients.types)))
        self._clock = Stopwatch()
        self._flops = [
            Flops(t.trainer, t.local_initial, heartbeat.beat, prints_hint) for t in clients.types
        ]

    @contextmanager
    def stage(self, name: str, round_: int) -> Iterator[None]:
        """Measure a stage of round ``round_`` (from 0)."""
        self._clock.lap("other", self.heartbeat.waited_seconds)
        if name == "train":
            self.heartbeat.enter_stage("the training", round_=round_ + 1)
            self.seconds = dict.fromkeys(self.seconds, 0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started
            self._clock.lap(name, self.heartbeat.waited_seconds)

    @contextmanager
    def local_training(
        self, type_number: int, clients: Sequence[int], samples: int
    ) -> Iterator[None]:
        """Measure the training of ``clients`` of one type, which have so many samples together."""
        self.heartbeat.enter_stage("the training", clients)
        started = time.perf_counter()
        yield
        self.throughput[:, type_number] += time.perf_counter() - started, samples

    def take_seconds(self, stage: str) -> np.ndarray:
        """Seconds of this rank by stage, [``STAGES``], since they were last taken; ``stage`` goes
        on.
        """
        self._clock.lap(stage, self.heartbeat.waited_seconds)
        return self._clock.take_seconds()

    def flops(self, cohort: Cohort) -> int:
        """Floating-point operations of the cohort's local training, or UNCOUNTED."""
        clients = cohort.clients
        client_counts = Counter((clients.type_of[c], clients.sizes[c]) for c in cohort.members)
        flops_of = {
            (number, size): self._flops[number].round_flops(size, cohort.round)
            for number, size in client_counts
        }
        if UNCOUNTED in flops_of.values():
            return UNCOUNTED
        return sum(count * flops_of[of] for of, count in client_counts.items())
