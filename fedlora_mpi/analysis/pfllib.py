"""For PFLlib: a split of ours as a folder that it reads, and a run's results as the file that it writes.

Source: https://github.com/TsingZ0/PFLlib, dataset/utils/dataset_utils.py and system/flcore/servers/serverbase.py.
"""

import json
from pathlib import Path

import numpy as np

from ..config import Config
from ..data.datasets import Data, Samples
from ..data.partition import Split
from ..store import hdf5
from ..store.files import replacing, write_atomic
from .run import RunView


def write_folder(config: Config, data: Data, split: Split, folder: Path) -> str:
    """Write ``folder/train/<k>.npz``, ``folder/test/<k>.npz`` and ``folder/config.json``; what was done, in a line.

    x are the numbers that our networks see, float32 [n, ch, H, W], y int64 [n]. config.json has the keys that PFLlib
    writes and, so that ``data.dataset: pfllib`` finds the bytes again, "mean" and "std" of each channel.
    Raises ValueError: texts, a shift between clients, a folder that holds something.
    """
    folder = folder.expanduser()
    if data.vocabulary:
        raise ValueError(f"data.dataset = {config.data.source.dataset}: texts are not written for PFLlib; only images are")
    if config.data.source.shift != "none":
        raise ValueError(f"data.shift = {config.data.source.shift}: is not written for PFLlib; set it to none")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to pfllib {folder}: there is something already; give a new folder")
    try:
        for name, samples, held in (("train", data.train, split.train), ("test", data.test, split.test)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for client, rows in enumerate(held):
                with replacing(folder / name / f"{client}.npz") as file, open(file, "wb") as handle:
                    np.savez_compressed(handle, data=np.array(_seen(data, samples, rows), dtype=object))
        write_atomic(folder / "config.json", json.dumps(_about(config, data, split), indent=1).encode())
    except OSError as error:
        raise ValueError(f"--to pfllib {folder}: cannot be written: {error.strerror}; choose another") from error
    return f"{folder}: {len(split.train)} clients for PFLlib, train/ and test/, config.json"


def write_results(run: RunView, file: Path) -> str:
    """Write ``rs_test_acc`` and ``rs_train_loss``, [T] each, of the evaluated rounds; what was done, in a line.

    rs_test_acc weighs the clients by their test samples, as PFLlib does (our logs weigh them equally). rs_train_loss is
    that of the round's local steps, where PFLlib has the loss of all training samples before them. Its entry 0 is the
    untrained network, which we do not evaluate: ours begins with round 1. rs_test_auc is not measured here, so not there.
    Raises ValueError: no evaluated round, a file that is there.
    """
    accuracy, loss = run.array("clients/accuracy").astype(float), run.array("train_loss")[: len(run.array("clients/accuracy"))]
    rows = np.flatnonzero(np.isfinite(accuracy).any(axis=1))
    if not len(rows):
        raise ValueError(f"{run.path}: no round was evaluated yet; wait for one")
    sizes = run.partition.test_counts.sum(axis=1) * np.isfinite(accuracy[rows])
    mean = (np.nan_to_num(accuracy[rows]) * sizes).sum(axis=1) / sizes.sum(axis=1)
    with hdf5.create(file) as content:
        hdf5.write(content, "rs_test_acc", mean, ["round"])
        hdf5.write(content, "rs_train_loss", np.asarray(loss)[rows].astype(float), ["round"])
    return f"{file}: rs_test_acc and rs_train_loss of {len(rows)} rounds; no rs_test_auc, which is not measured"


def _seen(data: Data, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
    """A client's samples as its network sees them."""
    shape = (1, -1, 1, 1)
    x = samples.x[rows].numpy().astype(np.float32) / np.float32(255)
    x = (x - np.reshape(np.float32(data.mean), shape)) / np.reshape(np.float32(data.std), shape)
    return {"x": x.astype(np.float32), "y": samples.y[rows].numpy()}


def _about(config: Config, data: Data, split: Split) -> dict:
    """config.json."""
    partition = config.data.partition
    both = split.train_counts + split.test_counts
    return {
        "num_clients": len(split.train),
        "num_classes": data.classes,
        "non_iid": True,
        "balance": len(set(map(len, split.train))) == 1,
        "partition": "fedlora_mpi",
        "Size of samples for labels in clients": [
            [[int(label), int(row[label])] for label in np.flatnonzero(row)] for row in both
        ],
        "alpha": getattr(partition, "alpha", None),
        "batch_size": config.train.batch_size,
        "mean": list(data.mean),
        "std": list(data.std),
    }
