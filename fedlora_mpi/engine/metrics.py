"""Further scores of a client's predictions on its own test data, computed by scikit-learn."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ..core.extras import extra_imports
from ..core.losses import Targets

MetricName = Literal["top1", "top5", "macro_f1", "auc", "mse", "mae", "perplexity"]


def top1(outputs: np.ndarray, y: np.ndarray) -> float:
    """Fraction of samples whose class has the highest output."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(y, outputs.argmax(1)))


def top5(outputs: np.ndarray, y: np.ndarray) -> float:
    """Fraction of samples whose class is among the five with the highest outputs."""
    from sklearn.metrics import top_k_accuracy_score

    return float(top_k_accuracy_score(y, outputs, k=5, labels=np.arange(outputs.shape[1])))


def macro_f1(outputs: np.ndarray, y: np.ndarray) -> float:
    """Mean of the F1 scores of the classes, or labels, that are in the targets or predicted.

    A class is predicted where its output is the highest, a label where its output is above 0.
    """
    from sklearn.metrics import f1_score

    predicted = outputs.argmax(1) if y.ndim == 1 else (outputs > 0).astype(int)
    return float(f1_score(y, predicted, average="macro", zero_division=np.nan))


def auc(outputs: np.ndarray, y: np.ndarray) -> float:
    """Mean area under the ROC curve of each class against the others, or of each label.

    Only classes that some but not all of the samples have count; without such a class it is NaN.
    """
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    if y.ndim == 1:
        outputs, y = softmax(outputs, axis=1), y[:, None] == np.arange(outputs.shape[1])
    columns = [c for c in range(y.shape[1]) if 0 < y[:, c].sum() < len(y)]
    if not columns:
        return float("nan")
    return float(roc_auc_score(y[:, columns], outputs[:, columns], average="macro"))


def mse(outputs: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error over samples and outputs."""
    from sklearn.metrics import mean_squared_error

    return float(mean_squared_error(y, outputs))


def mae(outputs: np.ndarray, y: np.ndarray) -> float:
    """Mean absolute error over samples and outputs."""
    from sklearn.metrics import mean_absolute_error

    return float(mean_absolute_error(y, outputs))


class Metric(NamedTuple):
    """compute: (outputs [M, k] float64, targets [M] or [M, k]) -> the score of M >= 1 samples.

    None: it follows from the loss, and the engine has it.
    """

    compute: Callable[[np.ndarray, np.ndarray], float] | None
    targets: tuple[Targets, ...]  # those that it goes with
    least_outputs: int = 1


METRICS: dict[str, Metric] = {
    "top1": Metric(top1, ("classes",)),
    "top5": Metric(top5, ("classes",), least_outputs=6),
    "macro_f1": Metric(macro_f1, ("classes", "labels")),
    "auc": Metric(auc, ("classes", "labels")),
    "mse": Metric(mse, ("numbers",)),
    "mae": Metric(mae, ("numbers",)),
    "perplexity": Metric(None, ("tokens",)),  # exp of the loss
}


def compute_metrics(names: Sequence[str], outputs: np.ndarray, y: np.ndarray) -> list[float]:
    """The metrics of a client, by ``names``. NaN without samples, or if an output is not finite."""
    if not len(y) or not np.isfinite(outputs).all():
        return [float("nan")] * len(names)
    computes = (METRICS[name].compute for name in names)
    return [compute(outputs, y) for compute in computes if compute]


def check_metrics(names: Sequence[str], targets: Targets, outputs: int) -> None:
    """Raise ValueError for a metric that does not go with the targets or the number of outputs, or
    without scikit-learn.
    """
    for name in names:
        metric = METRICS[name]
        if targets not in metric.targets:
            allowed = [n for n, other in METRICS.items() if targets in other.targets]
            raise ValueError(
                f"metrics = {name}: is for {' or '.join(metric.targets)}, and the targets are "
                f"{targets}; choose among {', '.join(allowed)}"
            )
        if outputs < metric.least_outputs:
            raise ValueError(f"metrics = {name}: is always 1 with {outputs} classes; leave it out")
    if any(METRICS[name].compute for name in names):
        with extra_imports("sklearn", "digits", f"metrics = {names[0]}"):
            import sklearn.metrics  # noqa: F401
