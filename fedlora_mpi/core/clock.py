"""The time that one rank spends in each stage."""

import time

import numpy as np

STAGES = ("train", "exchange", "evaluate", "other", "waiting")


class Stopwatch:
    """Seconds of this rank by stage since the last ``take_seconds``; they sum to the elapsed time.

    ``waiting`` is the time in messages, in which the rank waits for other ranks or the network; no
    other stage contains it. ``other`` is the time between rounds (the log, a checkpoint) and the
    time of the single FLOP count.
    """

    def __init__(self) -> None:
        self._seconds = np.zeros(len(STAGES))
        # the time of the last lap, and the total waiting time by then
        self._last_lap: tuple[float, float] | None = None

    def lap(self, stage: str, waited: float) -> None:
        """Count the time since the last lap as ``stage``; the first lap only starts the watch.

        waited: seconds this rank has spent in messages so far.
        """
        now = time.perf_counter()
        if self._last_lap is not None:
            before, waited_before = self._last_lap
            self._seconds[STAGES.index(stage)] += now - before - (waited - waited_before)
            self._seconds[STAGES.index("waiting")] += waited - waited_before
        self._last_lap = now, waited

    def take_seconds(self) -> np.ndarray:
        """Return the seconds by stage, [stages], and set them to zero."""
        seconds = self._seconds.copy()
        self._seconds[:] = 0
        return seconds
