"""What a process is doing and when it last made progress; the watchdog reads it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Heartbeat:
    """Round, stage and last progress of one process.

    A computation calls ``enter_stage`` at its start and ``beat`` after each piece. A process waits
    for others inside ``waiting``, for any length of time. ``beats`` counts all of these calls.
    ``members``: the processes of the run that are alive, as far as this one knows.
    """

    def __init__(self) -> None:
        self.is_waiting, self.beats, self.round = False, 0, 0
        self.enter_stage("the set-up", round_=0)
        self.members: tuple[int, ...] = (0,)
        self.waited_seconds = 0.0  # in total

    def enter_stage(
        self, stage: str, clients: Sequence[int] = (), round_: int | None = None
    ) -> None:
        """Begin a stage of ``clients``.

        ``round_`` counts from 1; None: the round stays the same.
        """
        self.round = self.round if round_ is None else round_
        self.stage, self.clients, self.last_progress = stage, clients, time.monotonic()
        self.beats += 1

    def beat(self) -> None:
        """Report that a batch, or another piece of the stage, is done."""
        self.last_progress = time.monotonic()
        self.beats += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark that this process waits for others during the block: this is no delay of its own."""
        self.is_waiting, started = True, time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - started
            self.last_progress, self.is_waiting = time.monotonic(), False
            self.beats += 1

    def stalled_seconds(self) -> float:
        """Return the seconds since the last progress.

        It is 0 while the process waits, and before the first round, because reading data may take
        any time.
        """
        return 0.0 if self.is_waiting or not self.round else time.monotonic() - self.last_progress

    def __str__(self) -> str:
        clients = ", ".join(map(str, self.clients))
        stage = f"{self.stage} of client {clients}" if clients else self.stage
        return f"round {self.round}, {stage}" if self.round else stage
