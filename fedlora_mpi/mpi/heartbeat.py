"""What a process is doing and when it last made progress; its watchdog reads it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Heartbeat:
    """Round, stage and last sign of progress of one process.

    A computation calls ``enter_stage`` at its start and ``beat`` after each piece. A process waits
    for others inside ``waiting``, for any time. ``beats`` counts all of these. ``members``: the
    processes of the run that are alive, as far as is known.
    """

    def __init__(self) -> None:
        self.is_waiting, self.beats, self.round = False, 0, 0
        self.enter_stage("the set-up", round_=0)
        self.members: tuple[int, ...] = (0,)
        self.waited_seconds = 0.0  # seconds in all

    def enter_stage(
        self, stage: str, clients: Sequence[int] = (), round_: int | None = None
    ) -> None:
        """A stage of these clients begins; ``round_`` counts from 1, None: the round stays."""
        self.round = self.round if round_ is None else round_
        self.stage, self.clients, self.last_progress = stage, clients, time.monotonic()
        self.beats += 1

    def beat(self) -> None:
        """A batch, or another piece of the stage, is done."""
        self.last_progress = time.monotonic()
        self.beats += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for others, which counts as no delay of its own."""
        self.is_waiting, started = True, time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - started
            self.last_progress, self.is_waiting = time.monotonic(), False
            self.beats += 1

    def stalled_seconds(self) -> float:
        """Seconds without progress; 0 while it waits, and before the first round, when reading data
        may take any time.
        """
        return 0.0 if self.is_waiting or not self.round else time.monotonic() - self.last_progress

    def __str__(self) -> str:
        clients = ", ".join(map(str, self.clients))
        stage = f"{self.stage} of client {clients}" if clients else self.stage
        return f"round {self.round}, {stage}" if self.round else stage
