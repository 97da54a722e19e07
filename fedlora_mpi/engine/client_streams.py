"""Compute several clients at once on a GPU, each on a stream of its own."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
AT_ONCE = 8  # clients on streams, unless a config says otherwise


class ClientStreams:
    """So many streams of a GPU. Without a GPU, clients are computed one after another.

    A small network uses a small part of a GPU at a time. On several streams the kernels of several
    clients run side by side, with the numbers of the loop.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        has_streams = device.type not in ("cpu", "meta")
        self._streams = [torch.cuda.Stream(device) for _ in range(number)] if has_streams else []

    @property
    def at_once(self) -> int:
        """Clients that are computed at once; 1 without a GPU."""
        return max(1, len(self._streams))

    def compute(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return the result of each of at most ``at_once`` tasks, each computed on its stream.

        The streams begin after what the current stream has to do, which then waits for them. So
        memory may pass from one to another. The host waits for nothing that a task does not wait
        for.
        """
        if not self._streams:
            return [task() for task in tasks]  # of one client
        current, results = torch.cuda.current_stream(), []
        used_streams = self._streams[: len(tasks)]
        for stream, task in zip(used_streams, tasks, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(task())
        for stream in used_streams:
            current.wait_stream(stream)
        return results
