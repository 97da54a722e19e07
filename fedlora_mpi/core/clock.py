"""Where the seconds of one rank go."""

import time

import numpy as np

STAGES = ("train", "exchange", "evaluate", "other", "waiting")


class Stopwatch:
    """Seconds of this rank by stage, since they were last ``taken``; together they are all that
    have passed.

    ``waiting`` is what it spent in messages, for others or for the network; a stage counts less
    that. ``other`` is what lies between two rounds (the log, a checkpoint), and to count FLOPs,
    once.
    """

    def __init__(self) -> None:
        self._seconds = np.zeros(len(STAGES))
        # when, and how long this rank had waited in all by then
        self._last_lap: tuple[float, float] | None = None

    def lap(self, stage: str, waited: float) -> None:
        """Count what has passed since the last lap to ``stage``; the first lap only starts the
        watch.

        waited: seconds this rank has spent in messages so far.
        """
        now = time.perf_counter()
        if self._last_lap is not None:
            before, waited_before = self._last_lap
            self._seconds[STAGES.index(stage)] += now - before - (waited - waited_before)
            self._seconds[STAGES.index("waiting")] += waited - waited_before
        self._last_lap = now, waited

    def take_seconds(self) -> np.ndarray:
        """[stages] the seconds, which count from zero again."""
        seconds = self._seconds.copy()
        self._seconds[:] = 0
        return seconds
