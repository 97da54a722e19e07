"""What a process is doing and when it last got on: written as it goes, read by its watchdog."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Pulse:
    """Round, stage and last sign of progress of one process.

    Whoever computes says ``at`` what and ``beat``s whenever a piece is done; whoever waits for
    other processes does so inside ``waiting``, for as long as it takes. ``moves`` counts all of
    these. ``members``: the processes of the run that are alive, as far as is known.
    """

    def __init__(self) -> None:
        self.waits, self.moves = False, 0
        self.at("the set-up", round_=0)
        self.members: tuple[int, ...] = (0,)
        self.waited = 0.0  # seconds in all

    def at(self, stage: str, clients: Sequence[int] = (), round_: int | None = None) -> None:
        """A stage begins, about these clients; ``round_`` counts from 1, None is the present one."""
        self.round = self.round if round_ is None else round_
        self.stage, self.clients, self.since = stage, clients, time.monotonic()
        self.moves += 1

    def beat(self) -> None:
        """A batch is done, or whatever the stage counts."""
        self.since = time.monotonic()
        self.moves += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Others are awaited: no time passes."""
        self.waits, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - begin
            self.since, self.waits = time.monotonic(), False
            self.moves += 1

    def still(self) -> float:
        """Seconds without progress; 0 while it waits, and before the rounds, when data may take any
        time to come.
        """
        return 0.0 if self.waits or not self.round else time.monotonic() - self.since

    def __str__(self) -> str:
        clients = ", ".join(map(str, self.clients))
        stage = f"{self.stage} of client {clients}" if clients else self.stage
        return f"round {self.round}, {stage}" if self.round else stage
