"""Pretrained networks that the runs of a table begin with, made here by ``pretrain``."""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..config import from_dict
from ..experiment.pretrain import pretrain


def make_backbone(
    file: Path,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    report: Callable[[str], None],
    classes: str | None = None,
) -> None:
    """Pretrain a network and write its weights to ``file``, unless the file exists.

    data (without the partition), model, train: blocks of a config. classes: the training data are
    those of these classes, such as "0-4"; None: of all.
    """
    if file.exists():
        return
    data = {**data, "partition": {"kind": "iid", "clients": 1}}
    blocks = {"data": data, "model": dict(model), "algorithm": "fedavg", "train": dict(train)}
    part = f" on classes {classes}" if classes else ""
    report(f"{file}: {train['epochs']} epochs{part} of {data['dataset']}")
    with redirect_stdout(sys.stderr):
        pretrain(from_dict(blocks, str(file)), str(file), 1, to=file, classes=classes)
