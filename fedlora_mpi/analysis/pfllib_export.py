"""Write files for PFLlib: a split as the folder that PFLlib reads, results as the file it writes.

Source: https://github.com/TsingZ0/PFLlib, dataset/utils/dataset_utils.py and
system/flcore/servers/serverbase.py.
"""

import json
from pathlib import Path

import numpy as np
import torch

from ..config import Config
from ..core.paths import expand_home
from ..data.datasets import Data
from ..data.feed import Feed
from ..data.partition import Split
from ..store import hdf5, nolinks
from ..store.files import replace_file, write_atomic
from .run_view import RunView


def write_folder(config: Config, data: Data, split: Split, folder: Path) -> str:
    """Write ``folder/train/<k>.npz``, ``folder/test/<k>.npz`` and ``folder/config.json``.

    x is float32 [n, ch, H, W]: the inputs of our networks, rotated if ``data.shift`` rotates them.
    y is int64 [n]. config.json has PFLlib's keys, and "mean" and "std" of each channel, from which
    ``data.dataset: pfllib`` restores the original bytes. Returns a line about what was written.
    Raises ValueError for texts and for a folder that is not empty.
    """
    folder = expand_home(folder)
    if not data.has_images or data.train.x.dtype != torch.uint8:
        kind = "texts" if data.vocabulary else "inputs that are no bytes"
        raise ValueError(
            f"data.dataset = {config.data.source.dataset}: {kind} are not written for PFLlib; only "
            "images are"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to pfllib {folder}: there is something already; give a new folder")
    shift = config.data.source.shift
    feed = Feed(
        data, split, seed=config.seed, shift=shift, device=torch.device("cpu"), augment=False
    )
    counts = np.zeros((len(split.train), data.classes), int)
    try:
        for name in ("train", "test"):
            with nolinks.open_folder(folder / name, folder, create=True):
                pass
            for client in range(len(split.train)):
                samples = (
                    feed.unshuffled_batch([client], True)
                    if name == "train"
                    else feed.test_batch([client], 0, feed.test_size(client))
                )
                arrays = {"x": samples.x[0].numpy(), "y": samples.y[0].numpy()}
                counts[client] += np.bincount(arrays["y"], minlength=data.classes)
                with replace_file(folder / name / f"{client}.npz", folder) as file:
                    np.savez_compressed(file, data=np.array(arrays, dtype=object))
        write_atomic(
            folder / "config.json",
            json.dumps(_folder_config(config, data, counts), indent=1).encode(),
        )
    except OSError as error:
        raise ValueError(
            f"--to pfllib {folder}: cannot be written: {error.strerror}; choose another"
        ) from error
    return f"{folder}: {len(split.train)} clients for PFLlib, train/ and test/, config.json"


def write_results(run: RunView, file: Path) -> str:
    """Write ``rs_test_acc`` and ``rs_train_loss``, [T] each, of the evaluated rounds.

    rs_test_acc weights the clients by their test samples, as PFLlib does; our logs weight them
    equally. rs_train_loss is the loss of the round's local steps; PFLlib has the loss of all
    training samples before these steps. PFLlib's entry 0 is the untrained network, which we do not
    evaluate: our first entry is the first evaluated round. There is no rs_test_auc, because it is
    not measured. Returns a line about what was written. Raises ValueError if no round was evaluated
    or if the file exists.
    """
    accuracy, loss = (
        run.array("clients/accuracy").astype(float),
        run.array("train_loss")[: len(run.array("clients/accuracy"))],
    )
    rows = np.flatnonzero(np.isfinite(accuracy).any(axis=1))
    if not len(rows) and np.isfinite(run.array("clients/loss")).any():
        raise ValueError(
            f"{run.path}: has no accuracy, because its targets are no classes; export a .pt file"
        )
    if not len(rows):
        raise ValueError(f"{run.path}: no round was evaluated yet; wait for one")
    sizes = run.partition.test_counts.sum(axis=1) * np.isfinite(accuracy[rows])
    mean = (np.nan_to_num(accuracy[rows]) * sizes).sum(axis=1) / sizes.sum(axis=1)
    with hdf5.create_file(file) as content:
        hdf5.write(content, "rs_test_acc", mean, ["round"])
        hdf5.write(content, "rs_train_loss", np.asarray(loss)[rows].astype(float), ["round"])
    return (
        f"{file}: rs_test_acc and rs_train_loss of {len(rows)} rounds; no rs_test_auc, which is "
        "not measured"
    )


def _folder_config(config: Config, data: Data, counts: np.ndarray) -> dict:
    """Return the content of config.json. counts: samples of each client and class."""
    partition = config.data.partition
    return {
        "num_clients": len(counts),
        "num_classes": data.classes,
        "non_iid": True,
        "balance": len({*counts.sum(axis=1)}) == 1,
        "partition": "fedlora_mpi",
        "Size of samples for labels in clients": [
            [[int(label), int(row[label])] for label in np.flatnonzero(row)] for row in counts
        ],
        "alpha": getattr(partition, "alpha", None),
        "batch_size": config.train.batch_size,
        "mean": list(data.mean),
        "std": list(data.std),
    }
