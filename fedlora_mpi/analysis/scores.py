"""Which columns of a log, beside the accuracy, say how good the models of a run are."""

from collections.abc import Mapping
from typing import Any


def score_names(config: Mapping[str, Any], columns: Mapping[str, Any]) -> list[str]:
    """The names among ``columns`` of the test loss, if ``model.loss`` is given, and of
    ``evaluate.metrics``, in this order.
    """
    model, evaluate = config.get("model"), config.get("evaluate")
    metrics = evaluate.get("metrics") if isinstance(evaluate, Mapping) else None
    names = ["loss"] if isinstance(model, Mapping) and "loss" in model else []
    names += metrics if isinstance(metrics, list) else []
    return [name for name in names if isinstance(name, str) and name in columns]
