"""Class-incremental learning, in which classes arrive one task after the other, for any method.

This is the scenario "class-IL" of van de Ven and Tolias, "Three scenarios for continual learning",
2019 (arXiv:1904.07734). The model has all classes from the start. It trains only on the classes of
the current task. It is evaluated on all classes seen so far, without knowing the task. Here all
clients change the task in the same rounds; the partition decides which classes each client holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.bounds import bounded
from .partition import Split


@dataclass(frozen=True)
class Tasks:
    """The ``data.tasks`` block: task t has classes t * ``classes`` to (t + 1) * ``classes`` - 1.

    The last task may have fewer classes. It continues after its rounds are over.
    """

    classes: int
    rounds: int

    def __post_init__(self) -> None:
        bounded(self, classes="[1, inf)", rounds="[1, inf)")

    def split_by_task(
        self, split: Split, train_y: np.ndarray, test_y: np.ndarray
    ) -> tuple[Split, ...]:
        """Return the part of ``split`` for each task.

        A task has the training samples of its classes and the test samples of all classes so far.
        train_y [M], test_y [M']: labels of all samples. A client may have no sample in a task.
        Raises ValueError if the data set has fewer classes than a task, or if no client has a
        training sample of some task.
        """
        classes = split.train_counts.shape[1]
        if self.classes > classes:
            raise ValueError(f"tasks.classes = {self.classes}: the data set has {classes} classes")
        return tuple(self._iter_task_splits(split, train_y, test_y, classes))

    def _iter_task_splits(
        self, split: Split, train_y: np.ndarray, test_y: np.ndarray, classes: int
    ) -> Iterator[Split]:
        for task, first in enumerate(range(0, classes, self.classes)):
            last = min(first + self.classes, classes)
            train, train_counts = _select_classes(
                range(first, last), train_y, split.train, split.train_counts
            )
            if not train_counts.any():
                which = f"class {first}" if last == first + 1 else f"classes {first} to {last - 1}"
                raise ValueError(
                    f"tasks.classes = {self.classes}: no client holds a training sample of task "
                    f"{task} ({which}); choose more classes or another partition"
                )
            test, test_counts = _select_classes(range(last), test_y, split.test, split.test_counts)
            yield Split(train, test, train_counts, test_counts)


def _select_classes(
    classes: range, y: np.ndarray, rows_by_client: Sequence[np.ndarray], counts: np.ndarray
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return each client's samples of ``classes``, in its order, and their counts [N, classes]."""
    is_selected = np.isin(np.arange(counts.shape[1]), classes)
    return tuple(rows[is_selected[y[rows]]] for rows in rows_by_client), counts * is_selected
