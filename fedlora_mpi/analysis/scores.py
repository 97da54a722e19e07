"""Which columns of a log say how good the models of a run are, and which way is better."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# beginnings of names, and words in names
_HIGHER = ("accuracy", "top1", "top5", "macro_f1", "auc")
_LOWER = (
    "loss",
    "mse",
    "mae",
    "seconds",
    "bytes",
    "flops",
    "drift",
    "consensus",
    "epsilon",
    "skipped",
    "nan_",
)


def better_direction(name: str) -> str:
    """``maximize`` or ``minimize``, if the name of a column tells which is better; else ""."""
    if name.startswith(_HIGHER):
        return "maximize"
    return "minimize" if any(word in name for word in _LOWER) else ""


def score_names(config: Mapping[str, Any], columns: Mapping[str, Any]) -> list[str]:
    """The names among ``columns`` of the test loss, if ``model.loss`` is given, and of
    ``evaluate.metrics``, in this order.
    """
    model, evaluate = config.get("model"), config.get("evaluate")
    metrics = evaluate.get("metrics") if isinstance(evaluate, Mapping) else None
    names = ["loss"] if isinstance(model, Mapping) and "loss" in model else []
    names += metrics if isinstance(metrics, list) else []
    return [name for name in names if isinstance(name, str) and name in columns]


def final_scores(config: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, float]:
    """The last number of each of ``score_names``; NaN if there is none."""
    finals = {}
    for name in score_names(config, columns):
        known = columns[name][~np.isnan(columns[name])]
        finals[name] = float(known[-1]) if len(known) else np.nan
    return finals


def describe_directions(names: Sequence[str]) -> str:
    """Say which of the scores are better low, and which high."""
    lower = [name for name in names if better_direction(name) == "minimize"]
    higher = [name for name in names if name not in lower]
    sides = ((lower, "lower"), (higher, "higher"))
    return ", ".join(f"{', '.join(side)} ({word} is better)" for side, word in sides if side)
